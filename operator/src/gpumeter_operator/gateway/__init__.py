"""The front door: one OpenAI-compatible address for all services of the cluster.

keys, models, endpoints, routing, ask, budget, hop, sse and refusal decide and do no input or output; world keeps what
the API server says; relay, front, app and telemetry speak HTTP. Knows no ledger and no price.
"""
