"""From an empty cluster to a bill, in front of a reader's eyes: what `make demo` runs. Standard library only."""
