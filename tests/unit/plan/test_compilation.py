"""`model.compile`: what is refused, what `auto` becomes, and what the plan says."""

from __future__ import annotations

from typing import Any

import pytest

from llm_training_toolkit import families
from llm_training_toolkit.config import Config, parse_config
from llm_training_toolkit.plan import choose_compilation, estimate_run_seconds, format_plan, make_plan
from llm_training_toolkit.plan.auto import get_candidate_zero_stages

DAY = 86_400.0


def config_of(**sections: dict[str, Any]) -> Config:
    data: dict[str, Any] = {
        "run": {"name": "compiled"},
        "model": {"name": "qwen3-0.6b"},
        "tokenizer": {"path": "x"},
        "data": {"sequence_length": 1024, "sources": [{"path": "x", "format": "text"}]},
        "train": {"steps": 10, "global_batch_size": 16},
    }
    for name, values in sections.items():
        data[name] = data.get(name, {}) | values
    return parse_config(data, "test")


REFUSED: dict[str, dict[str, dict[str, Any]]] = {
    "ZeRO 3": {"engine": {"zero_stage": 3}},
    "linear attention": {"model": {"name": "qwen3.5-4b"}},
    "DoRA": {"model": {"lora": {"use_dora": True}}},
    "4-bit": {"model": {"lora": {"quantize": "nf4"}}},
    "flex_attention": {"model": {"attn_implementation": "flex_attention"}},
    "varlen on CPU": {"model": {"attn_implementation": "varlen"}, "cluster": {"gpus_per_worker": 0}},
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_compiled_is_a_problem_and_off_by_auto(case: str) -> None:
    given = REFUSED[case]
    model = given.get("model", {})
    asked = make_plan(config_of(**given | {"model": model | {"compile": True}}))
    [problem] = [each for each in asked.problems if each.code == "not-compiled"]
    assert problem.where == "model.compile"
    assert case in problem.what
    automatic, off = (config_of(**given | {"model": model | {"compile": value}}) for value in ("auto", False))
    assert not {"not-compiled"} & {each.code for each in (*make_plan(automatic).problems, *make_plan(off).problems)}
    hf = families.resolve_hf_config(automatic)
    assert choose_compilation(automatic, hf, "cuda", DAY, None, begun=None).value == "false"
    assert not make_plan(automatic).compile
    assert "compile" not in make_plan(automatic).estimated


@pytest.mark.parametrize(
    ("changes", "device", "seconds", "missing", "value", "reason"),
    [
        ({}, "cuda", DAY, None, "true", "24 hours"),
        ({}, "cuda", 600.0, None, "false", "10 minutes"),
        ({}, "cuda", None, None, "false", "the speed of this GPU is unknown, and so is the gain"),
        ({}, "cuda", DAY, "rank 0: no compiler", "false", "rank 0: no compiler"),
        ({}, "cpu", DAY, None, "false", "on CPUs"),
        ({"run": {"deterministic": True}}, "cuda", DAY, None, "false", "run.deterministic"),
    ],
)
def test_auto_compiles_where_it_pays(
    changes: dict[str, Any], device: str, seconds: float | None, missing: str | None, value: str, reason: str
) -> None:
    config = config_of(**changes)
    chosen = choose_compilation(config, families.resolve_hf_config(config), device, seconds, missing, begun=None)
    assert (chosen.key, chosen.value) == ("model.compile", value)
    assert reason in chosen.reason


@pytest.mark.parametrize(
    ("begun", "changes", "missing", "value", "reason"),
    [
        (True, {}, None, "true", "as the run has begun"),
        (False, {}, None, "false", "as the run has begun"),
        (True, {}, "rank 0: no compiler", "false", "rank 0: no compiler"),
        (True, {"engine": {"zero_stage": 3}}, None, "false", "ZeRO 3"),
    ],
)
def test_a_resume_keeps_the_choice_where_it_can(
    begun: bool,
    changes: dict[str, Any],
    missing: str | None,
    value: str,
    reason: str,
) -> None:
    """With ten times as many workers the rest would take minutes, with one of ten a day."""
    config = config_of(**changes)
    for seconds in (600.0, DAY):
        chosen = choose_compilation(config, families.resolve_hf_config(config), "cuda", seconds, missing, begun=begun)
        assert chosen.value == value
        assert reason in chosen.reason


def test_the_plan_says_what_becomes_of_the_layers() -> None:
    def row(**sections: dict[str, Any]) -> str:
        [line] = [each for each in format_plan(make_plan(config_of(**sections))) if each.startswith("compile ")]
        return line.removeprefix("compile").strip()

    assert row() == "on GPUs, in runs of about an hour and more (auto)"
    assert row(model={"compile": True}) == "each decoder layer by torch.compile"
    assert row(model={"compile": False}) == "no"
    assert row(cluster={"gpus_per_worker": 0}) == "no (auto): on CPUs little is gained"
    plan = make_plan(config_of())
    config = config_of()
    chosen = choose_compilation(config, plan.hf_config, "cuda", DAY, None, begun=None)
    resolved = plan.with_compilation(chosen)
    assert resolved.compile
    assert resolved.notes[0] == str(chosen)
    assert "compile" in plan.estimated
    assert "compile" not in resolved.estimated


def test_compiled_layers_leave_zero_3_out() -> None:
    assert 3 in get_candidate_zero_stages(config_of())
    assert get_candidate_zero_stages(config_of(model={"compile": True})) == (0, 1, 2)


def test_the_length_of_a_run_follows_from_the_peak_of_its_gpus() -> None:
    assert estimate_run_seconds(0.4e15 * 2 * 60, 2, 1e15) == pytest.approx(60)
    assert estimate_run_seconds(1e15, 2, None) is None
