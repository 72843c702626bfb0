"""Ranks: context, collectives, stop requests and heartbeats."""
