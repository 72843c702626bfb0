"""`ltt drill`: fault injection into a run, compared with the same run undisturbed."""
