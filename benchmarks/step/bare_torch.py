"""A bare torch loop: bf16 model, fp32 master weights, fused AdamW, gradients summed over ranks in one call."""

from __future__ import annotations

import torch
import torch.distributed as dist

from common import CLIP, LR, WEIGHT_DECAY, batch, model, start


def main() -> None:
    """Train and report."""
    _, world_size, clock = start()
    net = model().train()
    low = list(net.parameters())
    master = torch.cat([parameter.detach().float().flatten() for parameter in low])
    master.requires_grad_()
    optimizer = torch.optim.AdamW([master], lr=LR, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY, fused=True)
    for _ in range(clock.steps):
        ids = batch(world_size)
        net(input_ids=ids, labels=ids).loss.backward()
        master.grad = torch.cat([parameter.grad.flatten() for parameter in low]).float()
        if world_size > 1:
            dist.all_reduce(master.grad)
            master.grad /= world_size
        torch.nn.utils.clip_grad_norm_([master], CLIP)
        optimizer.step()
        net.zero_grad()
        with torch.no_grad():
            pieces = torch.split(master, [parameter.numel() for parameter in low])
            for parameter, piece in zip(low, pieces, strict=True):
                parameter.copy_(piece.view_as(parameter))
        clock.tick()
    clock.report()


if __name__ == "__main__":
    main()
