"""The metered inference worker: serves one model on one pod and journals every nanosecond of its GPUs."""
