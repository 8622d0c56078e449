"""Flows: gather through adapters, let pure code decide, act through adapters."""
