"""Cache folders of code compiled at run time, on this machine's disk, so that the next attempt reuses it."""

from __future__ import annotations

import os
import platform
import tempfile
from pathlib import Path

import torch

_CACHE_DIR_BY_VARIABLE = {
    "TORCH_EXTENSIONS_DIR": "extensions",  # C++ operators of DeepSpeed
    "TRITON_CACHE_DIR": "triton",  # Triton kernels
    "TORCHINDUCTOR_CACHE_DIR": "inductor",  # output of torch.compile, which flex_attention uses
}
_GROUP_OTHER_WRITE = 0o022  # write permission of group and others


def set_compile_cache_dirs() -> None:
    """Set the cache variables that the environment leaves unset.

    Two of the three default to the home directory, which nodes may share: a rank would then wait for a lock left by a
    killed rank of another node. Sets nothing if the folder belongs to another user or is writable by others, because
    its contents are executed.
    """
    folder = Path(tempfile.gettempdir()) / f"ltt-compiled-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not folder.is_dir() or folder.is_symlink() or found.st_uid != os.getuid() or found.st_mode & _GROUP_OTHER_WRITE:
        return
    of_these_versions = folder / f"torch-{torch.__version__}-python-{platform.python_version()}"
    for name, inside in _CACHE_DIR_BY_VARIABLE.items():
        os.environ.setdefault(name, str(of_these_versions / inside))
