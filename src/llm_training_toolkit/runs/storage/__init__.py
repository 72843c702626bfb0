"""Storage of runs: a local disk or an object store."""
