"""Adapters: the only modules that speak to Kubernetes, HTTP, SQL and Prometheus."""
