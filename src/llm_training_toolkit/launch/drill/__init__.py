"""`ltt drill`: a run with real failures, compared with the same run undisturbed."""
