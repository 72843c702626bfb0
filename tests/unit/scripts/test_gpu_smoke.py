"""`make gpu-smoke`: says why where there is no GPU, is rehearsed whole on CPU, and is right on a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from llm_training_toolkit.setup.machine import find_compiler_problem
from smoke.bench import Bench
from smoke.checks import CHECKS, Check, attention_faults
from smoke.order import order_for
from smoke.runner import Done, Failed, Result, Runner, Skipped, Task

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "scripts" / "gpu_smoke.py"
GPU_ONLY = {"device binding", "flash_attention_2", "flex_attention", "MFU", "peak memory"}


def smoke(report: Path, *options: str, **environment: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """Run the script as a person would; what it printed, and what it wrote."""
    command = [sys.executable, str(SCRIPT), "--json", str(report), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})
    return done, json.loads(report.read_text())


@pytest.fixture
def without_ray_and_yaml(tmp_path: Path) -> Mapping[str, str]:
    """An environment in which neither ray nor ruamel.yaml can be imported, as on a plain CUDA image."""
    folder = tmp_path / "without"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text("import sys\nsys.modules['ray'] = None\nsys.modules['ruamel'] = None\n")
    return {"PYTHONPATH": str(folder)}


def python(code: str, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([environment["PYTHONPATH"], str(ROOT / "src")])
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": paths},
    )


def test_without_a_gpu_it_says_so_and_ends_well(tmp_path: Path) -> None:
    done, report = smoke(tmp_path / "report.json", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("skipped: torch finds no GPU here (torch ")
    assert len(done.stdout.splitlines()) == 1
    assert report["status"] == "skipped"
    assert report["reason"] in done.stdout
    assert report["rows"] == []
    assert report["machine"]["packages"]["deepspeed"]


@pytest.mark.slow
@pytest.mark.timeout(2700)
def test_everything_is_rehearsed_on_cpu_without_ray_and_yaml(
    tmp_path: Path, without_ray_and_yaml: Mapping[str, str]
) -> None:
    for module in ("ray", "ruamel.yaml"):
        assert python(f"import {module}", without_ray_and_yaml).returncode == 1
    done, report = smoke(tmp_path / "report.json", "--device", "cpu", "--minutes", "40", **without_ray_and_yaml)
    assert done.returncode == 0, done.stdout + done.stderr
    assert report["status"] == "ok"
    rows = {row["name"]: row for row in report["rows"]}
    assert list(rows) == [check.name for check in CHECKS]
    assert all(name in done.stdout for name in rows)
    skipped = {name for name, row in rows.items() if row["result"] == "skipped"}
    uncompiled = {"compiled layers"} if find_compiler_problem(gpu=False) else set()
    assert skipped == GPU_ONLY | {"Ray Train"} | uncompiled
    assert rows["Ray Train"]["value"] == "ray is not installed"
    assert all("needs a GPU" in rows[name]["value"] for name in GPU_ONLY)
    assert report["machine"]["packages"]["ray"] is None
    assert "equal bit for bit" in rows["save and resume"]["value"]


def test_what_has_no_time_left_is_skipped(tmp_path: Path) -> None:
    done, report = smoke(tmp_path / "report.json", "--device", "cpu", "--minutes", "0")
    assert done.returncode == 0, done.stderr
    assert report["status"] == "skipped"
    elsewhere = {"flash_attention_2", "flex_attention", "Ray Train"}
    elsewhere |= {"compiled layers"} if find_compiler_problem(gpu=False) else set()
    made = [row for row in report["rows"] if row["name"] not in elsewhere]
    assert all(row["result"] == "skipped" and row["value"].startswith("out of time") for row in made)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.timeout(720)
def test_every_check_is_right_on_a_gpu(tmp_path: Path) -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip(f"torch {torch.__version__} finds no GPU here")
    done, report = smoke(tmp_path / "report.json", "--minutes", "10")
    assert done.returncode == 0, done.stdout
    rows = {row["name"]: row for row in report["rows"]}
    optional = {"flash_attention_2", "flex_attention", "Ray Train"}
    if torch.cuda.device_count() == 1:
        optional |= {"all-reduce", "two ranks"}
    assert {name for name, row in rows.items() if row["result"] != "ok"} <= optional, done.stdout


def test_plain_data_needs_no_yaml_and_a_file_says_what_to_install(without_ray_and_yaml: Mapping[str, str]) -> None:
    reading = "from pathlib import Path; from llm_training_toolkit.config import load_config, parse_config; "
    wrong = python(reading + "parse_config({'train': {'steps': '3'}}, 'here')", without_ray_and_yaml)
    assert 'here: train.steps = "3": expected a whole number' in wrong.stderr
    file = python(reading + "load_config(Path('some.yaml'))", without_ray_and_yaml)
    assert "some.yaml: YAML cannot be read here: `pip install ruamel.yaml`" in file.stderr


def runner(folder: Path, seconds: float) -> Runner:
    return Runner(folder, "cpu", time.monotonic() + seconds)


def test_a_task_that_fails_hangs_or_ends_says_so(tmp_path: Path) -> None:
    tasks = runner(tmp_path, 60)
    raised = tasks.run(Task("raises", "task_probe", [{}], needs=0, limit=60))
    assert isinstance(raised, Failed)
    assert raised.reason == "KeyError: 'device'"
    assert "Traceback" in raised.log
    ended = tasks.run(Task("ends", "no_such_task", [{}], needs=0, limit=60, ranks=2))
    assert isinstance(ended, Failed)
    assert ended.reason == "rank 0 ended without a result, exit code 1"
    assert "No module named smoke.no_such_task" in ended.log
    hanging = tasks.run(Task("hangs", "task_probe", [{"device": "cpu"}], needs=0, limit=0.1))
    assert hanging == Failed("hangs: no result within 0 s")


def test_the_time_of_all_tasks_is_bounded(tmp_path: Path) -> None:
    tasks = runner(tmp_path, 0.5)
    early = tasks.run(Task("early", "task_probe", [{"device": "cpu"}], needs=30, limit=60))
    assert isinstance(early, Skipped)
    assert early.reason.startswith("out of time: takes about 30 s")
    late = tasks.run(Task("late", "task_probe", [{"device": "cpu"}], needs=0, limit=60))
    assert late == Skipped("out of time: it was stopped")


def test_one_failure_fails_the_rows_it_carries_and_no_other(tmp_path: Path) -> None:
    bench = Bench("cpu", tmp_path, cores=2, gpus=0, free_bytes=0.0, matmul_flops=1e12)
    right = {"losses": [2.0, 1.0]}
    results: dict[str, Result] = {
        "good": Done([right], 1.0),
        "bad": Failed("it broke", "log"),
        "out": Skipped("one GPU"),
    }

    def row(*tasks: str, optional: bool = False) -> tuple[str, str]:
        made = Check("x", tasks, lambda *_: ("ok", "fine", ""), optional=optional).row(results, bench, {})
        return made.result, made.value

    assert row("good") == ("ok", "fine")
    assert row("good", "bad") == ("failed", "bad: it broke")
    assert row("bad", optional=True) == ("skipped", "does not work here: it broke")
    assert row("out", "good") == ("skipped", "one GPU")


def test_a_leak_between_documents_is_a_fault() -> None:
    exact = {"error": 0.01, "eager_error": 0.01, "gradient_error": 0.01, "eager_gradient_error": 0.01}
    found = exact | {"alone_error": 0.01, "leak": 0.0, "change": 3.0, "scale": 3.0}
    assert attention_faults(found) == []
    assert attention_faults(found | {"leak": 0.01}) == ["leak between documents"]
    assert attention_faults(found | {"error": 0.02}) == ["logits"]
    assert attention_faults(found | {"alone_error": 1.0}) == ["a document alone"]
    assert attention_faults(found | {"change": 0.0}) == ["the document that was changed"]


def test_a_gpu_gets_the_whole_size_where_it_fits(tmp_path: Path) -> None:
    def bench(free_gb: float, gpus: int = 1) -> Bench:
        return Bench("cuda", tmp_path, cores=16, gpus=gpus, free_bytes=1e9 * free_gb, matmul_flops=8e14)

    large = bench(139).large("large")
    assert large["model"]["config_overrides"] == {"vocab_size": 151_936, "num_hidden_layers": 28}
    assert large["train"] == {"steps": 16, "global_batch_size": 16, "micro_batch_size": "auto"}
    assert bench(16).large("large")["model"]["config_overrides"]["num_hidden_layers"] < 28
    packages = {"ray": None, "flash_attn": None}
    alone, pair = order_for(bench(139), packages), order_for(bench(139, gpus=2), packages)
    assert {name: skip.reason for name, skip in alone.left_out.items()} == {
        "ray": "ray is not installed",
        "two_ranks": "one GPU",
        "flash_attention_2": "the package flash_attn is not installed",
    }
    assert {task.name for task in pair.together} - {task.name for task in alone.together} == {"two_ranks"}
    assert "compiled" in {task.name for task in alone.first}
    lacking = order_for(bench(139), packages, "no compiler").left_out
    assert lacking["compiled"] == Skipped("no compiler")
    assert {task.ranks for task in pair.together if task.name in {"ranks", "two_ranks"}} == {2}
