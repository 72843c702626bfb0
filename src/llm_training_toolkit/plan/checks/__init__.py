"""Checks of a configuration and its notes: problems with a stable code, and what to know."""
