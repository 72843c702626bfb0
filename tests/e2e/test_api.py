"""`import llm_training_toolkit as ltt`: light to import, one road with the command line, exceptions with problems."""

from __future__ import annotations

import importlib
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import llm_training_toolkit as ltt
import llm_training_toolkit.plan.plan as plan_module
from llm_training_toolkit.errors import ConfigError, PlanError
from tiny_runs import tiny_config, write_corpus

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "configs" / "quickstart.yaml"
STEPS = 4
_LOADED = """
import sys, time
began = time.process_time()
import llm_training_toolkit as ltt
package = time.process_time() - began
names = [getattr(ltt, name) for name in ltt.__all__]
heavy = {"torch", "ray", "deepspeed", "transformers", "pyarrow", "pydantic"} & sys.modules.keys()
print(package, *sorted(heavy))
"""
_TRAIN = """
import json, signal, sys
import llm_training_toolkit as ltt
before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
config, lines = json.loads(sys.argv[1]), []
prepared = ltt.prepare(config, progress=lines.append)
done = ltt.train(config, progress=lines.append)
run = ltt.open_run(done.run)
table, model = run.metrics(), ltt.load_model(done.run, device="cpu")
assert before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
assert "torch.distributed" not in sys.modules or not __import__("torch").distributed.is_initialized()
from llm_training_toolkit.models.sampling import SamplingParams
print(json.dumps({
    "done": done.to_json(), "lines": lines, "same": prepared == run.dataset_info(),
    "steps": table["step"].to_pylist(), "losses": table["train/loss"].to_pylist(), "state": run.state.state,
    "checkpoints": [manifest.step for manifest in run.checkpoints()], "lr": run.config.optim.lr,
    "text": model.complete_prompt("def ", SamplingParams(max_new_tokens=2)).text,
    "page": run.write_report(sys.argv[2]).read_text()[:15],
}))
"""


def test_the_package_is_light_and_its_names_load_no_heavy_library() -> None:
    done = subprocess.run([sys.executable, "-c", _LOADED], capture_output=True, text=True, check=True)
    seconds, *heavy = done.stdout.split()
    assert float(seconds) < 0.1
    assert heavy == ["pydantic"]


def test_packages_with_the_names_of_verbs_stay_packages() -> None:
    assert plan_module.make_plan is ltt.plan.make_plan  # type: ignore[attr-defined]
    assert callable(ltt.train)
    assert importlib.import_module("llm_training_toolkit.train.stragglers") is ltt.train.stragglers  # type: ignore[attr-defined]
    with pytest.raises(AttributeError):
        ltt.absent  # type: ignore[attr-defined]  # noqa: B018


def test_a_configuration_is_a_path_a_mapping_or_an_object() -> None:
    read = ltt.load_config(QUICKSTART)
    mapping = read.model_dump(mode="json", exclude_unset=True)
    changes = ["train.steps=7", "train.precision=fp32"]
    plans = [ltt.plan(source, changes) for source in (QUICKSTART, str(QUICKSTART), mapping, read)]
    assert [plan.steps for plan in plans] == [7, 7, 7, 7]
    assert all(plan == plans[0] for plan in plans)
    assert ltt.load_config(mapping) == ltt.load_config(read) == read


def test_a_plan_on_a_cluster_has_time_and_cost() -> None:
    cluster = ROOT / "cluster" / "aws-h100.yaml"
    config = ROOT / "configs" / "qwen" / "lora-7b-one-node.yaml"
    estimated = ltt.estimate(config, cluster, ["train.epochs=null", "train.steps=100"])
    assert estimated.hours
    assert estimated.cost_usd
    planned = ltt.plan(config, ["train.epochs=null", "train.steps=100"], cluster=cluster)
    assert {"hours", "cost"} <= set(planned.estimated)


def test_errors_name_every_problem_and_survive_pickling() -> None:
    with pytest.raises(ltt.ToolkitError) as caught:
        ltt.load_config({"train": {"stesp": 3, "steps": -1}, "engine": {"zero_stage": 7}})
    assert isinstance(caught.value, ConfigError)
    problems = {problem.where: problem for problem in caught.value.problems}
    assert {"train.stesp", "train.steps", "engine.zero_stage", "model"} <= set(problems)
    assert {problem.code for problem in problems.values()} == {"invalid-configuration"}
    assert pickle.loads(pickle.dumps(caught.value)).problems == caught.value.problems
    with pytest.raises(ltt.ToolkitError) as alone:
        ltt.open_run("absent")
    [problem] = alone.value.problems
    assert (problem.code, problem.what) == ("unusable-checkpoint", str(alone.value))
    with pytest.raises(ConfigError):
        ltt.tune({"base": str(QUICKSTART), "search": {"optim.lr": [1e-3, 1e-2]}})


@pytest.mark.slow
def test_training_through_the_api_reads_back_its_losses(tmp_path: Path) -> None:
    sections: dict[str, dict[str, Any]] = {
        "data": {"cache": str(tmp_path / "cache")},
        "train": {"steps": STEPS, "global_batch_size": 4},
        "cluster": {"workers": 0},
    }
    config = tiny_config(write_corpus(tmp_path / "corpus", 20), tmp_path / "runs", **sections)
    arguments = [config.model_dump_json(exclude_unset=True), str(tmp_path / "page.html")]
    done = subprocess.run(
        [sys.executable, "-c", _TRAIN, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    found = json.loads(done.stdout)
    assert (found["done"]["status"], found["done"]["step"], found["state"]) == ("finished", STEPS, "finished")
    assert found["steps"] == [0, *range(1, STEPS + 1)]
    assert found["losses"][0] is None
    assert all(0 < loss < 10 for loss in found["losses"][1:])
    assert any(line.startswith("step 1/4") for line in found["lines"])
    assert found["checkpoints"] == [STEPS]
    assert found["same"]
    assert found["page"] == "<!doctype html>"


@pytest.mark.slow
def test_a_run_that_cannot_start_raises_the_error_of_the_command(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "nothing", tmp_path / "runs")
    with pytest.raises(ltt.ToolkitError) as caught:
        ltt.train(config, ["train.global_batch_size=1", "cluster.workers=2"], progress=list)
    assert isinstance(caught.value, PlanError)
    [problem] = caught.value.problems
    assert problem.where == "cluster.workers"
    assert problem == ltt.plan(config, ["train.global_batch_size=1", "cluster.workers=2"]).problems[0]
    assert not (tmp_path / "runs").exists()
