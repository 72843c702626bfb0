"""Imported once by the process that a rehearsal's tasks are forked from: what most of them would import."""

from __future__ import annotations

from llm_training_toolkit.engine import prepare_deepspeed

prepare_deepspeed("cpu")

import llm_training_toolkit.launch.torchrun  # noqa: E402, F401 - DeepSpeed is imported after its settings are made
