"""Counterparts for contract tests: each speaks one side of an interface of ours over real sockets on 127.0.0.1."""
