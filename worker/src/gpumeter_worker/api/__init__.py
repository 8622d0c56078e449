"""The worker's HTTP: OpenAI's API on one port, the usage protocol on another. Knows no torch."""
