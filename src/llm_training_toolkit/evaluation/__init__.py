"""Evaluation: held-out loss during training, and tasks (`eval.tasks`) on an exported model."""
