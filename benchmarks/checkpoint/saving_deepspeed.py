"""A bare DeepSpeed loop, ZeRO 2, bf16, with its `save_checkpoint`."""

from __future__ import annotations

import json
import os
import sys

import torch
import torch.distributed as dist

from loop import CLIP, LR, WEIGHT_DECAY, Clock, SaveRequest, model, rows


def main() -> None:
    """Train, save and report."""
    asked = SaveRequest(**json.loads(sys.argv[1]))
    torch.set_num_threads(asked.threads)
    os.environ["LOCAL_RANK"] = "0"
    import deepspeed

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    deepspeed.init_distributed(dist_init_required=False)
    net = model(asked.shape)
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY, fused=True)
    engine, *_ = deepspeed.initialize(
        model=net,
        optimizer=optimizer,
        dist_init_required=False,
        config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": asked.sequences,
            "gradient_clipping": CLIP,
            "bf16": {"enabled": True},
            "zero_optimization": {"stage": 2},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 1_000_000,
        },
    )
    clock = Clock()
    for step in range(1, asked.steps + 1):
        for _ in range(asked.sequences):
            ids = rows(1)
            engine.backward(engine(input_ids=ids, labels=ids).loss)
            engine.step()
        clock.step()
        if asked.every and step % asked.every == 0 and step < asked.steps:
            engine.save_checkpoint(asked.directory)
            clock.saved()
    clock.end(asked.directory)


if __name__ == "__main__":
    main()
