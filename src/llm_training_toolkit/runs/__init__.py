"""Run directories: layout, attempts, status and metrics. No torch."""
