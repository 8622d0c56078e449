"""The engine process: decides what shares a step, runs it, and reports what it took."""
