"""The contract between the workers that measure usage and the ledger that keeps it.

Owns what both sides must agree on to the byte: the usage record and its canonical form, the hash chain, the page in
which records travel, periods of UTC time, and the exact split of a measured step. Standard library only; knows no
transport, no database and no price.
"""
