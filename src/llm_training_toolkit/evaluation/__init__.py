"""Evaluation: the held-out loss while a run trains, and tasks that an exported model is measured by."""
