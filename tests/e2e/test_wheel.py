"""A wheel of the toolkit, installed into an empty environment outside the repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import llm_training_toolkit

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "llm_training_toolkit"
RIGHT_AND_WRONG = """
from llm_training_toolkit.evaluation.sandbox.isolation import find_sandbox_kind
from llm_training_toolkit.evaluation.sandbox.run import SandboxLimits, run_programs
results = run_programs(["x = 1", "1 / 0"], find_sandbox_kind(unsafe=True), SandboxLimits(), 1, lambda done: None)
print(*(result.end for result in results))
"""
Command = Callable[..., str]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy because setuptools leaves folders beside the sources."""
    copy, built = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("built")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    shutil.copytree(PACKAGE, copy / "src" / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", built]
    _run([sys.executable, "-m", "pip", "wheel", *options, copy], cwd=copy)
    [found] = built.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Command:
    """Runs a program of an environment that has the wheel, and of this one only the dependencies."""
    folder = tmp_path_factory.mktemp("elsewhere")
    venv.create(folder / "venv", symlinks=True)
    python = folder / "venv" / "bin" / "python"
    [packages] = (folder / "venv" / "lib").glob("python*/site-packages")
    _run([sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel], cwd=folder)
    # The folder alone: files *.pth in it, such as that of an editable install, are not read.
    (packages / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")

    def command(program: str, *arguments: str) -> str:
        return _run([python.with_name(program), *arguments], cwd=folder)

    return command


def _run(arguments: Sequence[object], *, cwd: Path) -> str:
    """Run a program without the PYTHONPATH of the tests, and return what it prints."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        list(map(str, arguments)), cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    files = (path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if not name.startswith("llm_training_toolkit-")}
    assert packed == {str(path.relative_to(PACKAGE.parent)) for path in files}


def test_wheel_gives_the_commands(installed: Command) -> None:
    place = installed("python", "-c", "import llm_training_toolkit; print(llm_training_toolkit.__file__)")
    assert "elsewhere" in place
    assert llm_training_toolkit.__version__ in installed("ltt", "--version")
    folder = Path(place.strip()).parents[5]
    (folder / "scratch.yaml").write_text(installed("ltt", "init", "scratch", "--model", "qwen3-0.6b"))
    assert '"problems": []' in installed("ltt", "plan", "scratch.yaml", "--json")


def test_wheel_sandboxes_programs(installed: Command) -> None:
    assert installed("python", "-c", RIGHT_AND_WRONG).split() == ["passed", "failed"]
