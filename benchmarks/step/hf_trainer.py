"""Hugging Face Trainer on the same model and batch; bf16 as it does it, by autocast over fp32 weights."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from common import CLIP, LR, WEIGHT_DECAY, Clock, model, start
from loop import rows


class Rows(Dataset[dict[str, torch.Tensor]]):
    """Random rows."""

    def __init__(self, count: int) -> None:
        self._ids = rows(count)

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self._ids[index], "labels": self._ids[index]}


class Ticks(TrainerCallback):  # type: ignore[misc] # transformers has no types
    """Ticks the clock after every step."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """A step is complete."""
        self._clock.tick()


def main() -> None:
    """Train and report."""
    asked, clock = start()
    with tempfile.TemporaryDirectory() as directory:
        arguments = TrainingArguments(
            output_dir=directory,
            max_steps=asked.steps,
            per_device_train_batch_size=asked.rows,
            gradient_accumulation_steps=asked.micro_batches,
            learning_rate=LR,
            weight_decay=WEIGHT_DECAY,
            adam_beta2=0.95,
            max_grad_norm=CLIP,
            bf16=asked.precision == "bf16",
            use_cpu=True,
            optim="adamw_torch_fused",
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        data = Rows(asked.steps * asked.global_batch)
        net = model(asked, torch.float32)
        Trainer(model=net, args=arguments, train_dataset=data, callbacks=[Ticks(clock)]).train()
    clock.report()


if __name__ == "__main__":
    main()
