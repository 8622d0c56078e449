"""Chat traffic of several tenants, as unruly as real clients are, for the demo and the e2e ring.

Standard library only. `python -m traffic --help`, or `traffic.client.run(Options(...))`.
"""
