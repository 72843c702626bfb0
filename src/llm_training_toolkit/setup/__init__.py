"""Setup on the driver, before ranks exist: resume state, weights, machine, files of the run."""
