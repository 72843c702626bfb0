"""Setup on the driver, before ranks exist: state to resume from, weights, machine, files of the run."""
