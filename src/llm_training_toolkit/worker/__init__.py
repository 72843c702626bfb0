"""Worker: the work of one rank, from its start to the end of the run."""
