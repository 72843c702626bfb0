"""Launching: the only place that knows Ray. Decides where a run's ranks live and keeps watch over them."""
