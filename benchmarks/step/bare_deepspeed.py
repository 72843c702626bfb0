"""A bare DeepSpeed loop as its documentation writes it: ZeRO 2, bf16, torch's fused AdamW.

With a second argument `fp32` gradients are reduced and accumulated in fp32, as the toolkit does it.
"""

from __future__ import annotations

import sys

import torch

from common import CLIP, GLOBAL_BATCH, LR, WEIGHT_DECAY, batch, model, start

FP32_GRADIENTS = {"communication_data_type": "fp32", "data_types": {"grad_accum_dtype": "fp32"}}


def main() -> None:
    """Train and report."""
    _, world_size, clock = start()
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # as the toolkit has it
    deepspeed.init_distributed(dist_init_required=False)
    net = model()
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY, fused=True)
    engine, *_ = deepspeed.initialize(
        model=net,
        optimizer=optimizer,
        dist_init_required=False,
        config={
            "train_micro_batch_size_per_gpu": GLOBAL_BATCH // world_size,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": CLIP,
            "bf16": {"enabled": True},
            "zero_optimization": {"stage": 2, "reduce_bucket_size": 4_200_000, "allgather_bucket_size": 4_200_000},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 1_000_000,
            **(FP32_GRADIENTS if sys.argv[2:] == ["fp32"] else {}),
        },
    )
    for _ in range(clock.steps):
        ids = batch(world_size)
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
        clock.tick()
    clock.report()


if __name__ == "__main__":
    main()
