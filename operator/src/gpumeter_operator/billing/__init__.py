"""Billing: pure functions from the ledger's facts to accounts, decisions and reports. No clock, storage or cluster."""
