"""Runs untrusted programs in a sandbox: contained, resource-limited and always killed at the end."""
