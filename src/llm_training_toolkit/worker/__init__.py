"""Worker: what one rank does, from its start to the end of the run."""
