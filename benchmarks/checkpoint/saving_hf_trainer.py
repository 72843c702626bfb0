"""Hugging Face Trainer on the same model, bf16 as it does it (autocast over fp32 weights), with its checkpoints."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loop import CLIP, LR, WEIGHT_DECAY, Clock, SaveRequest, model, rows


class Rows(Dataset[dict[str, torch.Tensor]]):
    """Random rows."""

    def __init__(self, count: int) -> None:
        self._ids = rows(count)

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self._ids[index], "labels": self._ids[index]}


class Ticks(TrainerCallback):  # type: ignore[misc] # transformers has no types
    """Ticks the clock after every step and every checkpoint."""

    clock: Clock

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """The first step begins."""
        self.clock = Clock()

    def on_step_end(self, _: Any, state: TrainerState, control: TrainerControl, **__: Any) -> None:
        """A step is done; after the last one nothing is saved."""
        self.clock.step()
        control.should_save &= state.global_step < state.max_steps

    def on_save(self, *_: Any, **__: Any) -> None:
        """A checkpoint is done."""
        self.clock.saved()


def main() -> None:
    """Train, save and report."""
    asked = SaveRequest(**json.loads(sys.argv[1]))
    torch.set_num_threads(asked.threads)
    arguments = TrainingArguments(
        output_dir=asked.directory,
        max_steps=asked.steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=asked.sequences,
        learning_rate=LR,
        weight_decay=WEIGHT_DECAY,
        adam_beta2=0.95,
        max_grad_norm=CLIP,
        bf16=True,
        use_cpu=True,
        optim="adamw_torch_fused",
        save_strategy="steps" if asked.every else "no",
        save_steps=asked.every or asked.steps,
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    ticks = Ticks()
    net = model(asked.shape).float()
    data = Rows(asked.steps * asked.sequences)
    Trainer(model=net, args=arguments, train_dataset=data, callbacks=[ticks]).train()
    ticks.clock.end(asked.directory)


if __name__ == "__main__":
    main()
