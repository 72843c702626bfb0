"""The tasks of `make gpu-smoke`, each in a process of its own, and what becomes of their results."""
