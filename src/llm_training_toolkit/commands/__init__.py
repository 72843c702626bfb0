"""Commands: the work of each verb on the driver."""
