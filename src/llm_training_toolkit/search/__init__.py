"""Hyperparameter search: space, rungs, results of trials. Imports no Ray, and torch only to write TensorBoard files."""
