"""Monitoring: console, metrics and logs of a run."""
