"""`make experiment` copies a template that runs as it is: variants, seeds, table, picture."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

import llm_training_toolkit as ltt
from tiny_runs import write_corpus

ROOT = Path(__file__).parents[2]
STEPS = 3
FAMILIES = ("qwen", "starcoder")


def make(folder: Path, *variables: str) -> subprocess.CompletedProcess[str]:
    command = ["make", "--silent", "experiment", f"EXPERIMENTS={folder}", *variables]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_an_experiment_needs_a_new_name_and_a_known_family(tmp_path: Path) -> None:
    assert make(tmp_path, "NAME=one").returncode == 0
    for refused in (["NAME=one"], [], ["NAME=../two"], ["NAME=two", "FAMILY=llama"]):
        assert make(tmp_path, *refused).returncode == 2
    assert [path.name for path in tmp_path.iterdir()] == ["one"]
    files = {"README.md", "config.yaml", "experiment.yaml", "run.py"}
    assert {path.name for path in (tmp_path / "one").iterdir()} == files


@pytest.mark.parametrize("family", FAMILIES)
def test_configuration_of_a_template_plans_without_problems(family: str) -> None:
    folder = ROOT / "experiments" / "templates" / family
    variants = YAML(typ="safe").load(folder / "experiment.yaml")["variants"]
    for fields in variants.values():
        plan = ltt.plan(folder / "config.yaml", [f"{key}={json.dumps(value)}" for key, value in fields.items()])
        assert plan.problems == ()
        assert plan.parameters < 2e6
    assert len(variants) == 2


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_template_runs_in_miniature_and_draws_its_result(family: str, tmp_path: Path) -> None:
    assert make(tmp_path, "NAME=one", f"FAMILY={family}").returncode == 0
    corpus = write_corpus(tmp_path / "corpus", 20)
    for path in (tmp_path / "one").glob("*.yaml"):
        path.write_text(path.read_text().replace("python:stdlib", str(corpus)))
    changes = ["cluster.workers=0", f"train.steps={STEPS}", "eval.interval=2", "tokenizer.train.vocab_size=512"]
    changes += ["data.eval.fraction=0.1", f"data.cache={tmp_path / 'cache'}"]
    command = [sys.executable, str(tmp_path / "one" / "run.py"), "--seeds", "1", "--", *changes]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "one" / "result.json").read_text())
    assert len(result["variants"]) == 2
    for variant, seeds in result["variants"].items():
        assert [step for step, _ in seeds["1"]["training"]] == list(range(1, STEPS + 1))
        assert f"| {variant} | {seeds['1']['validation'][-1][1]:.4f} |" in done.stdout
    assert (tmp_path / "one" / "curves.png").stat().st_size > 10_000
