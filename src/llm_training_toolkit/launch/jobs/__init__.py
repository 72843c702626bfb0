"""Runs as Ray jobs, driven from outside the cluster: this process submits and watches, `ltt train` runs there."""
