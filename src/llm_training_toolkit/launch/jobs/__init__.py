"""Runs as Ray jobs, seen from outside the cluster: this process only asks and watches; `ltt train` works over there."""
