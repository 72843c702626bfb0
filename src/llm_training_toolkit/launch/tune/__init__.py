"""Ray Tune: search for hyperparameters."""
