"""A bare DeepSpeed loop as its documentation writes it: ZeRO 2, torch's fused AdamW."""

from __future__ import annotations

import torch

from common import CLIP, LR, WEIGHT_DECAY, batch, model, start


def main() -> None:
    """Train and report."""
    asked, clock = start()
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # as the toolkit has it
    deepspeed.init_distributed(dist_init_required=False)
    net = model(asked, asked.dtype)
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY, fused=True)
    bucket = sum(parameter.numel() for parameter in net.parameters())
    engine, *_ = deepspeed.initialize(
        model=net,
        optimizer=optimizer,
        dist_init_required=False,
        config={
            "train_micro_batch_size_per_gpu": asked.rows,
            "gradient_accumulation_steps": asked.micro_batches,
            "gradient_clipping": CLIP,
            "bf16": {"enabled": asked.precision == "bf16"},
            "zero_optimization": {"stage": 2, "reduce_bucket_size": bucket, "allgather_bucket_size": bucket},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 1_000_000,
        },
    )
    for _ in range(asked.steps):
        for _ in range(asked.micro_batches):
            ids = batch(asked)
            engine.backward(engine(input_ids=ids, labels=ids).loss)
            engine.step()
        clock.tick()
    clock.report()


if __name__ == "__main__":
    main()
