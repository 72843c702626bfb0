"""Forecast of time, traffic and cost on a cluster, by sourced formulas."""
