"""Train and tune Qwen and StarCoder on any Ray cluster, and lose nothing when machines die."""

__version__ = "0.1.0"
