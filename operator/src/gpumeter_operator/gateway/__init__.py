"""The front door: one OpenAI-compatible address for all services of the cluster.

keys, models, endpoints, routing, room, outlook, demand, ask, budget, hop, sse and refusal decide and do no input or
output; world keeps what the API server says; doorman wakes who waits; relay, reply, front, internal, app and telemetry
speak HTTP. Knows no ledger and no price.
"""
