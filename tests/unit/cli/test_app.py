"""The command line: quick to answer, and every wrong request is said in words with the right exit code."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llm_training_toolkit import __version__
from llm_training_toolkit.cli.app import main
from llm_training_toolkit.launch.request import build_interrupted_json
from llm_training_toolkit.runs.directory import RunDirectory
from tiny_runs import tiny_config

ROOT = Path(__file__).parents[3]
QUICKSTART = "configs/quickstart.yaml"
CONFIGS = sorted(
    str(path.relative_to(ROOT))
    for path in (ROOT / "configs").rglob("*.yaml")
    if path.parent.name != "search"  # searches are no runs: tests/unit/config/test_search.py
)
PLAN_KEYS = {
    "parameters",
    "trainable_parameters",
    "steps",
    "global_batch",
    "accumulation",
    "tokens_per_step",
    "deepspeed",
    "problems",
    "memory_gb_per_device",
    "estimated",
}
_LOADED = """
import sys
from llm_training_toolkit.cli.app import main
try:
    main()
finally:
    heavy = {"torch", "ray", "deepspeed", "transformers"} & sys.modules.keys()
    print("loaded:", *sorted(heavy), file=sys.stderr)
"""


def ltt(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in this process, which has imported everything: a process for each request takes a second."""
    out, err = io.StringIO(), io.StringIO()
    given, code = sys.argv, 0
    sys.argv = ["ltt", *arguments]
    try:
        with contextlib.chdir(ROOT), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.argv = given
    return subprocess.CompletedProcess(sys.argv, code, out.getvalue(), err.getvalue())


def ltt_apart(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, as `train` needs: it takes over the terminal and the signals."""
    command = [sys.executable, "-m", "llm_training_toolkit", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


def assert_refused(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["train", "--help"],
        ["generate", "--help"],
        ["export", "--help"],
        ["evaluate", "--help"],
        ["evaluate", "--compare", "absent"],
        ["evaluate", "absent", "--task", "infill"],
        ["evaluate", "--task", "humaneval"],
        ["generate", "absent", "--prompt", "def"],
        ["plan", QUICKSTART, "train.precision=bf16"],
        ["plan", QUICKSTART, "train.precision=bf16", "--json"],
        ["plan", QUICKSTART, "--cluster", "cluster/aws-h100.yaml"],
        ["plan", "absent.yaml"],
    ],
    ids=" ".join,
)
def test_what_a_person_waits_for_loads_no_heavy_library(arguments: list[str]) -> None:
    command = [sys.executable, "-c", _LOADED, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.stderr.splitlines()[-1] == "loaded:"


def test_a_plan_measures_the_precision_of_this_machine_with_torch_alone() -> None:
    command = [sys.executable, "-c", _LOADED, "plan", QUICKSTART]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.stderr.splitlines()[-1] == "loaded: torch"
    assert "train.precision = " in done.stdout


def test_what_an_actor_imports_while_the_workers_start_is_light() -> None:
    """Ray does not import Ray Train by itself, nor torch: a second of CPU each, on the cores the workers start on."""
    heavy = "{'torch', 'ray.train'} & sys.modules.keys()"
    code = f"import sys, llm_training_toolkit.launch.ray.control_actor; print(*({heavy}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout == "\n"


@pytest.mark.parametrize("module", ["commands.train", "launch.backend", "launch.drill.drill", "launch.tune.tuner"])
def test_what_prepares_the_environment_of_ray_does_not_import_it(module: str) -> None:
    """Ray reads RAY_AUTH_MODE when it is imported; set later, a cluster of ours refuses this process."""
    code = f"import sys, llm_training_toolkit.{module}; print('ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout == "False\n"


def test_help_names_every_verb_with_what_it_does() -> None:
    done = ltt("--help")
    assert done.returncode == 0
    assert "Train and tune Qwen and StarCoder" in done.stdout
    for verb in ("plan", "prepare", "train", "export", "generate", "evaluate"):
        assert f"  {verb} " in done.stdout


def test_no_argument_at_all_shows_the_help() -> None:
    done = ltt()
    assert "Usage:" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_version() -> None:
    done = ltt("--version")
    assert (done.returncode, done.stdout) == (0, f"ltt {__version__}\n")


def test_an_unknown_verb_is_a_wrong_request() -> None:
    assert_refused(ltt("trian", QUICKSTART), 2, "trian")


def test_an_unknown_option_is_a_wrong_request() -> None:
    assert_refused(ltt("plan", QUICKSTART, "--jsn"), 2, "--jsn")


@pytest.mark.parametrize("verb", ["plan", "prepare", "train"])
def test_a_missing_file_is_a_wrong_request_that_names_it(verb: str) -> None:
    assert_refused(ltt_apart(verb, "no/such.yaml"), 2, "error: ", "no/such.yaml")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.stesp=5", "train.steps"),
        ("train.steps=many", "train.steps"),
        ("train.steps=-1", "train.steps"),
        ("nonsense", "nonsense"),
        ("engine.zero_stage=7", "engine.zero_stage"),
    ],
)
def test_a_bad_override_is_a_wrong_request_that_names_the_field(override: str, said: str) -> None:
    assert_refused(ltt("plan", QUICKSTART, override), 2, "error: ", said)


def test_all_mistakes_are_named_at_once() -> None:
    assert_refused(
        ltt("plan", QUICKSTART, "train.stesp=5", "engine.zero_stage=7"), 2, "train.stesp", "engine.zero_stage"
    )


def test_a_plan_with_problems_is_shown_and_refused() -> None:
    done = ltt("plan", QUICKSTART, "cluster.workers=17", "--json")
    assert done.returncode == 2
    [problem] = json.loads(done.stdout)["problems"]
    assert problem["where"] == "cluster.workers"
    assert problem.keys() == {"code", "where", "what", "fix"}


def test_an_override_changes_the_plan() -> None:
    plans = [json.loads(ltt("plan", QUICKSTART, *more, "--json").stdout) for more in ([], ["train.steps=7"])]
    assert [plan["steps"] for plan in plans] == [240, 7]


@pytest.mark.parametrize("config", CONFIGS)
def test_every_config_plans_without_problems_and_keeps_the_contract(config: str) -> None:
    done = ltt("plan", config, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    plan = json.loads(done.stdout)
    assert plan.keys() >= PLAN_KEYS
    assert plan["problems"] == []
    assert plan["parameters"] >= plan["trainable_parameters"] > 0
    assert plan["tokens_per_step"] % plan["global_batch"] == 0
    assert isinstance(plan["deepspeed"], dict)
    assert all(size >= 0 for size in plan["memory_gb_per_device"].values())


@pytest.mark.parametrize("config", CONFIGS)
def test_every_config_plans_for_people_in_lines_of_a_screen(config: str) -> None:
    done = ltt("plan", config)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[0].startswith("run ")
    assert "PROBLEM" not in done.stdout


def test_generating_from_a_directory_without_a_model_says_what_to_name(tmp_path: Path) -> None:
    done = ltt("generate", str(tmp_path), "--prompt", "def", "--suffix", "pass")
    assert_refused(
        done,
        1,
        f"error: {tmp_path}: neither a run nor a model there",
        "name a run's directory, or an exported one",
    )


def test_a_generation_of_nothing_in_particular_is_refused() -> None:
    assert_refused(ltt("generate", "absent"), 2, "give a --prompt, or --chat")
    assert_refused(ltt("generate", "absent", "--chat", "--json"), 2, "--json prints one answer")
    assert_refused(ltt("generate", "absent", "--chat", "--prompt", "a", "--suffix", "b"), 2, "not with --chat")
    assert_refused(ltt("generate", "absent", "--prompt", "a", "--step", "3"), 1, "no run there")


def test_evaluating_says_what_is_missing(tmp_path: Path) -> None:
    assert_refused(ltt("evaluate"), 2, "give one MODEL and a --task, or several runs with --compare")
    assert_refused(ltt("evaluate", str(tmp_path), "--task", "infill"), 1, "neither a run nor a model there")
    assert_refused(ltt("evaluate", "--task", "infill"), 2, "name a model")
    assert_refused(ltt("evaluate", "--task", "mmlu"), 2, "mmlu")
    assert_refused(ltt("evaluate", str(tmp_path), "--task", "infill", "--samples", "3"), 2, "--samples: not for --task")
    (tmp_path / "resolved.json").write_text("{}")
    assert_refused(ltt("evaluate", str(tmp_path), "--task", "infill"), 1, "a run without an export: ltt export")


@pytest.mark.slow
def test_given_completions_are_scored_without_a_model(tmp_path: Path) -> None:
    problem = {"task_id": "a", "prompt": "def f():\n", "test": "def check(f):\n    assert f() == 1", "entry_point": "f"}
    (tmp_path / "problems.jsonl").write_text(json.dumps(problem))
    (tmp_path / "done.jsonl").write_text(json.dumps({"task_id": "a", "completion": "    return 1"}))
    files = ["--data", str(tmp_path / "problems.jsonl"), "--completions", str(tmp_path / "done.jsonl")]
    done = ltt("evaluate", "--task", "humaneval", *files, "--unsafe", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["task"], found["pass@1"], found["problems"]) == ("humaneval", 1.0, 1)


@pytest.mark.parametrize(
    ("verb", "expected"),
    [
        ("train", {"run": None, "step": None, "status": "stopped", "checkpoint": None}),
        ("tune", {"search": None, "best": None, "trials": [], "tokens": 0}),
    ],
)
def test_a_command_that_is_stopped_before_its_loop_prints_its_object(
    verb: str, expected: dict[str, object], tmp_path: Path
) -> None:
    file = tmp_path / "run.yaml"
    os.mkfifo(file)  # the command waits for its configuration until the signal
    command = [sys.executable, "-m", "llm_training_toolkit", verb, str(file), "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    with process, file.open("w"):  # opens once the command has opened the other end
        process.send_signal(signal.SIGTERM)
        printed, _ = process.communicate(timeout=60)
    assert process.returncode == 75
    assert json.loads(printed) == expected


def test_the_object_of_an_interrupted_run_names_run_and_checkpoint(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "corpus", tmp_path / "runs")
    run = RunDirectory(tmp_path / "runs" / config.run.name)
    expected = {"run": str(run.path), "step": None, "status": "stopped", "checkpoint": None}
    assert build_interrupted_json(config) == expected
    checkpoint = run.get_checkpoint_dir(3, 1)
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
    assert build_interrupted_json(config) == expected | {"checkpoint": str(checkpoint)}
