"""Renamed keys of earlier versions, for the error message only: no old key is accepted."""

from __future__ import annotations

from collections.abc import Mapping

_SOURCE = {"too_long": "overlong", "per": "group_by"}
_SECTIONS: Mapping[str, Mapping[str, str]] = {
    "model": {
        "shape": "config_overrides",
        "grow_vocabulary": "resize_vocab_to",
        "attention": "attn_implementation",
        "loss_chunk": "loss_chunk_size",
    },
    "model.lora": {"targets": "target_modules", "rslora": "use_rslora", "dora": "use_dora"},
    "data.sources": _SOURCE,
    "data.eval.sources": _SOURCE,
    "data.eval": {"by": "split_by"},
    "optim": {"schedule": "lr_scheduler", "min_lr": "min_lr_ratio", "clip": "max_grad_norm"},
    "train": {"global_batch": "global_batch_size", "micro_batch": "micro_batch_size"},
    "engine": {"zero": "zero_stage"},
    "checkpoint": {"every": "interval", "keep": "keep_latest"},
    "eval": {"every": "interval"},
    "eval.tasks": {"every": "interval"},
    "cluster": {"placement": "placement_strategy", "wait": "resource_timeout"},
    "failures": {
        "max": "max_failures",
        "same_step": "max_same_step_failures",
        "hang": "hang_timeout",
        "on_spike": "on_loss_spike",
        "ledger": "log_samples",
    },
    # Search files
    "": {
        "first": "points_to_evaluate",
        "set": "overrides",
        "concurrent": "max_concurrent_trials",
        "retries": "max_failures",
        "impossible": "invalid",
    },
    "scheduler": {
        "factor": "reduction_factor",
        "first_tokens": "grace_period_tokens",
        "first_steps": "grace_period_steps",
    },
    "searcher": {"start": "n_startup_trials"},
}
_DISTRIBUTION = {"log_uniform": "loguniform", "integers": "randint"}  # below `search`, under any key


def find_renamed_key(path: tuple[str | int, ...]) -> str | None:
    """Return the current name of the last part of a key, or None for a key that never existed."""
    *parents, key = path
    section = ".".join(part for part in parents if isinstance(part, str))
    if parents and parents[0] == "search":
        return _DISTRIBUTION.get(str(key))
    return _SECTIONS.get(section, {}).get(str(key))
