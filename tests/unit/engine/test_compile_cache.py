"""What is compiled is kept on this machine, where nobody else can put anything."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

import fork_server
from llm_training_toolkit.engine.compile_cache import set_compile_cache_dirs
from llm_training_toolkit.setup.machine import find_compiler_problem

NAMES = ("TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")

TRAINING = """
import sys
sys.path[:] = sys.argv[1].split(":")
import torch
from llm_training_toolkit.engine.compile_cache import set_compile_cache_dirs
set_compile_cache_dirs()
from torch._dynamo.utils import counters
from unit.models.test_layer_compiler import module_of, packings, run
torch.set_num_threads(1)
run(module_of("starcoderbase-1b", checkpointing="full", backend="inductor"), next(packings(1)))
print(counters["inductor"]["fxgraph_cache_miss"], counters["aot_autograd"]["autograd_cache_hit"])
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this user's compiled operations go, with nothing set in the environment."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that it is as before afterwards
        monkeypatch.delenv(name)
    return tmp_path / f"ltt-compiled-{os.getuid()}"


def test_the_next_attempt_finds_what_this_one_has_compiled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "/set/by/the/node")
    set_compile_cache_dirs()
    first = {name: os.environ[name] for name in NAMES}
    assert first.pop("TRITON_CACHE_DIR") == "/set/by/the/node"
    assert all(Path(place).is_relative_to(folder) for place in first.values())
    assert folder.stat().st_mode & 0o777 == 0o700
    for name in first:
        monkeypatch.delenv(name)
    set_compile_cache_dirs()
    assert first == {name: os.environ[name] for name in first}


def test_torch_looks_there(folder: Path) -> None:
    from torch.utils.cpp_extension import _get_build_directory

    set_compile_cache_dirs()
    assert Path(_get_build_directory("some_operation", verbose=False)).is_relative_to(folder)


def test_a_folder_that_others_may_write_to_is_left_alone(folder: Path, tmp_path: Path) -> None:
    folder.mkdir()
    folder.chmod(0o777)
    set_compile_cache_dirs()
    assert not any(name in os.environ for name in NAMES)
    folder.rmdir()
    folder.symlink_to(tmp_path)
    set_compile_cache_dirs()
    assert not any(name in os.environ for name in NAMES)


@pytest.mark.slow
def test_the_next_attempt_compiles_nothing(tmp_path: Path) -> None:
    missing = find_compiler_problem(gpu=False)
    if missing:
        pytest.skip(missing)
    tests = Path(__file__).parents[2]
    paths = os.pathsep.join([*sys.path, str(tests), str(tests / "support")])
    own = {"TORCHINDUCTOR_CACHE_DIR", "TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR"}
    kept = {name: value for name, value in os.environ.items() if name not in own}
    environment = kept | {"TMPDIR": str(tmp_path)}
    first, second = (
        fork_server.run([sys.executable, "-c", TRAINING, paths], env=environment, check=True, capture_output=True)
        for _ in range(2)
    )
    assert first.stdout.split() == ["2", "0"], "forward and backward pass"
    assert second.stdout.split() == ["0", "1"]
