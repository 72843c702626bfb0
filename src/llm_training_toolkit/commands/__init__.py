"""Commands: what a verb does on the driver."""
