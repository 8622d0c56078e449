"""From a measured step to journaled records: attribution, accounts, meter, journal, lease.

Knows no torch (but for the CUDA clock), no HTTP and no price.
"""
