"""Cache folders of code compiled at run time, on this machine's disk, so that the next attempt reuses it."""

from __future__ import annotations

import os
import platform

import torch

from llm_training_toolkit.errors import LaunchError
from llm_training_toolkit.runs.user_directory import create_user_directory

_CACHE_DIR_BY_VARIABLE = {
    "TORCH_EXTENSIONS_DIR": "extensions",  # C++ operators of DeepSpeed
    "TRITON_CACHE_DIR": "triton",  # Triton kernels
    "TORCHINDUCTOR_CACHE_DIR": "inductor",  # output of torch.compile, which flex_attention uses
}


def set_compile_cache_dirs() -> None:
    """Set the cache variables that the environment leaves unset.

    Two of the three default to the home directory, which nodes may share: a rank would then wait for a lock left by a
    killed rank of another node. Sets nothing if the folder belongs to another user or is writable by others, because
    its contents are executed.
    """
    try:
        folder = create_user_directory("ltt-compiled")
    except LaunchError:
        return
    of_these_versions = folder / f"torch-{torch.__version__}-python-{platform.python_version()}"
    for name, inside in _CACHE_DIR_BY_VARIABLE.items():
        os.environ.setdefault(name, str(of_these_versions / inside))
