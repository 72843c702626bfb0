"""A bare torch loop: fused AdamW on fp32 weights, gradients summed over ranks in one call.

In bf16 the model computes in bf16 beside fp32 master weights, and micro-batches add up in bf16, as autograd does it.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from common import CLIP, LR, WEIGHT_DECAY, batch, model, start, world_size


def main() -> None:
    """Train and report."""
    asked, clock = start()
    net = model(asked, asked.dtype).train()
    low = list(net.parameters())
    bf16, several = asked.dtype == torch.bfloat16, world_size() > 1
    updated = [torch.cat([p.detach().float().flatten() for p in low]).requires_grad_()] if bf16 else low
    optimizer = torch.optim.AdamW(updated, lr=LR, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY, fused=True)
    sizes = [parameter.numel() for parameter in low]
    for _ in range(asked.steps):
        for _ in range(asked.micro_batches):
            ids = batch(asked)
            (net(input_ids=ids, labels=ids).loss / asked.micro_batches).backward()
        if bf16 or several:
            flat = torch.cat([parameter.grad.flatten() for parameter in low]).float()
            if several:
                dist.all_reduce(flat)
                flat /= world_size()
            if bf16:
                updated[0].grad = flat
            else:
                for parameter, piece in zip(low, torch.split(flat, sizes), strict=True):
                    parameter.grad = piece.view_as(parameter)
        torch.nn.utils.clip_grad_norm_(updated, CLIP)
        optimizer.step()
        net.zero_grad()
        if bf16:
            with torch.no_grad():
                for parameter, piece in zip(low, torch.split(updated[0], sizes), strict=True):
                    parameter.copy_(piece.view_as(parameter))
        clock.tick()
    clock.report()


if __name__ == "__main__":
    main()
