"""Where what is compiled at run time is kept: a folder of this machine that the next attempt finds."""

from __future__ import annotations

import os
import platform
import tempfile
from pathlib import Path

import torch

_CACHE_DIR_BY_VARIABLE = {
    "TORCH_EXTENSIONS_DIR": "extensions",
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
}
"""Operations of DeepSpeed (C++), kernels of Triton, and what torch.compile makes, which flex_attention goes through."""
_GROUP_OTHER_WRITE = 0o022
"""Permissions to write of group and others."""


def set_compile_cache_dirs() -> None:
    """Name the folders in the environment; what is set there already stays.

    Two of the three lie in the home directory otherwise, which nodes may share: there a rank of one node waits for a
    lock that a killed rank of another has left. Nothing is set where the folder belongs to somebody else, because what
    lies in it is run.
    """
    folder = Path(tempfile.gettempdir()) / f"ltt-compiled-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not folder.is_dir() or folder.is_symlink() or found.st_uid != os.getuid() or found.st_mode & _GROUP_OTHER_WRITE:
        return
    of_these_versions = folder / f"torch-{torch.__version__}-python-{platform.python_version()}"
    for name, inside in _CACHE_DIR_BY_VARIABLE.items():
        os.environ.setdefault(name, str(of_these_versions / inside))
