"""The ledger: an append-only database of records, containers, reports and everything that a bill is proved by.

Owns the only use of SQL. `read` is what anyone may do with it, `store` what the collector alone does.
"""
