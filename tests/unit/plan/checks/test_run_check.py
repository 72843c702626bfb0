"""What a family's tokens cannot say of a source, and weights that cannot be loaded, are problems before a start."""

from __future__ import annotations

import ast
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llm_training_toolkit import families
from llm_training_toolkit.config import parse_config
from llm_training_toolkit.config.schema import Config
from llm_training_toolkit.errors import ConfigError
from llm_training_toolkit.plan import Plan, make_plan
from llm_training_toolkit.plan.checks import run_check
from llm_training_toolkit.plan.checks.run_check import _find_revision_problems, find_problems
from tiny_runs import tiny_config


def problems(model: str, source: dict[str, Any], *, held_out: bool = False) -> list[str]:
    given = {"path": "x", "format": "code", **source}
    plain = {"path": "y", "format": "code"}
    data = {"sources": [plain], "eval": {"sources": [given]}} if held_out else {"sources": [plain, given]}
    config = Config.model_validate(
        {
            "run": {"name": "x"},
            "model": {"name": model},
            "tokenizer": {"path": "t"},
            "data": {"sequence_length": 128, **data},
            "train": {"steps": 1},
        }
    )
    return [problem.where for problem in make_plan(config).problems]


def test_every_problem_has_a_code_of_its_own() -> None:
    codes = []
    for path in Path(run_check.__file__).parent.glob("*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "Problem":
                assert isinstance(call.args[0], ast.Constant), ast.unparse(call)
                codes.append(str(call.args[0].value))
    assert len(codes) >= 37
    assert len(set(codes)) == len(codes)
    assert all(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)+", code) for code in codes)


FOUND = [
    ("qwen2-0.5b", {"metadata": True}, ["data.sources[1].metadata"]),
    ("qwen2-0.5b", {"group_by": "repository"}, ["data.sources[1].group_by"]),
    ("qwen2-0.5b", {"metadata": True, "fim": {}}, ["data.sources[1].fim", "data.sources[1].metadata"]),
    ("starcoderbase-1b", {"group_by": "repository"}, ["data.sources[1].group_by"]),
    ("starcoderbase-1b", {"group_by": "repository", "metadata": True, "fim": {}}, []),
    ("starcoder2-3b", {"group_by": "repository"}, []),
    ("qwen3-0.6b", {"group_by": "repository", "metadata": True, "fim": {}}, []),
    ("qwen3-0.6b", {"format": "issues"}, ["data.sources[1].format"]),
    ("qwen3-0.6b", {"format": "notebooks"}, ["data.sources[1].format"]),
    ("qwen3-0.6b", {"format": "notebooks", "layout": "script"}, []),
    ("starcoder2-3b", {"format": "commits"}, ["data.sources[1].format"]),
    ("starcoder2-3b", {"format": "notebooks"}, []),
    ("starcoder2-3b", {"format": "issues"}, []),
    ("starcoderbase-1b", {"format": "commits"}, []),
    ("gpt_bigcode-santacoder", {"format": "commits"}, ["data.sources[1].format"]),
    ("qwen3-0.6b", {"format": "git", "layout": "commits"}, ["data.sources[1].layout"]),
    ("qwen3-0.6b", {"format": "git", "context": "window"}, ["data.sources[1].context"]),
    ("qwen3-0.6b", {"format": "git"}, []),
    ("starcoderbase-1b", {"format": "git", "context": "window"}, []),
]


@pytest.mark.parametrize(("model", "source", "where"), FOUND)
def test_sources_that_the_family_cannot_write(model: str, source: dict[str, Any], where: list[str]) -> None:
    assert problems(model, source) == where


@pytest.mark.parametrize(
    ("source", "begin"),
    [
        ({"format": "commits"}, "Use one of"),
        ({"format": "git", "layout": "commits"}, "Set layout: diffs, or use one of"),
        ({"format": "notebooks"}, "Set layout: script, or use one of"),
    ],
)
def test_missing_tokens_of_a_layout_name_the_models_that_have_them(source: dict[str, str], begin: str) -> None:
    config = tiny_config(Path("x"), Path("t"), data={"sources": [{"path": "x", **source}]})
    size = families.find_size("qwen3-0.6b")
    (problem,) = (each for each in find_problems(config, size, size.hf_values, 1) if each.code == "no-layout-tokens")
    assert problem.fix.startswith(begin)
    assert "starcoderbase-1b, starcoderbase-3b" in problem.fix
    assert ("starcoder2" in problem.fix) == (source["format"] == "notebooks")


@pytest.mark.parametrize(
    ("model", "lora", "balance", "codes"),
    [
        ("qwen3-8b", None, 0.001, ["router-balance-without-experts"]),
        ("qwen3.5-4b", None, 0.001, ["router-balance-without-experts"]),
        ("qwen3-30b-a3b", {}, 0.001, ["router-balance-with-adapters"]),
        ("qwen3-30b-a3b", None, 0.001, []),
        ("qwen2-57b-a14b", None, 0.001, []),
        ("qwen3.5-35b-a3b", {"target_modules": ["q_proj", "up_proj", "down_proj"]}, None, ["adapters-beside-experts"]),
        ("qwen3-30b-a3b", {"target_modules": ["gate_up_proj"]}, None, ["adapters-beside-experts"]),
        ("qwen3-30b-a3b", {"target_parameters": ["gate_up_proj", "down_proj"]}, None, []),
        ("qwen3-8b", {"target_parameters": ["down_proj"]}, None, ["expert-adapters-without-experts"]),
        (
            "qwen3.5-35b-a3b",
            {"target_parameters": ["down_proj"], "dropout": 0.1, "use_dora": True},
            None,
            ["expert-adapters-option"] * 2,
        ),
        ("qwen3.5-4b", {"target_modules": ["in_proj_z", "out_proj", "up_proj"]}, None, []),
    ],
)
def test_routers_and_experts(model: str, lora: Any, balance: float | None, codes: list[str]) -> None:
    config = Config.model_validate(
        {
            "run": {"name": "x"},
            "model": {"name": model, "lora": lora},
            "tokenizer": {"path": "t"},
            "data": {"sequence_length": 128, "sources": [{"path": "y", "format": "code"}]},
            "train": {"steps": 1, "router_balance": balance},
        }
    )
    plan = make_plan(config)
    assert [problem.code for problem in plan.problems] == codes
    fall_out = any("fall out of use" in note for note in plan.notes)
    assert fall_out == ("a3b" in model and balance is None)


@pytest.mark.parametrize("is_installed", [True, False])
def test_near_duplicates_need_their_library(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *, is_installed: bool
) -> None:
    (tmp_path / "rensa").mkdir()
    (tmp_path / "rensa" / "__init__.py").touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path)] if is_installed else [])
    monkeypatch.delitem(sys.modules, "rensa", raising=False)
    config = tiny_config(Path("x"), Path("t"), data={"near_duplicates": {}})
    size = families.find_size("qwen3-0.6b")
    found = [problem.code for problem in find_problems(config, size, size.hf_values, 1)]
    assert ("near-duplicates-without-rensa" in found) == (not is_installed)


@pytest.mark.parametrize(
    ("changes", "codes"),
    [
        ({"train": {"steps": 9}}, []),
        ({"train": {"steps": None, "epochs": 2}}, ["partitions-with-epochs"]),
        ({"data": {"partitions": 1}, "train": {"steps": None, "epochs": 2}}, []),
        (
            {"data": {"sources": [{"path": "x", "format": "code", "group_by": "repository", "metadata": True}]}},
            ["partitions-of-repositories"],
        ),
    ],
)
def test_partitions_that_cannot_be_dealt_or_would_not_help(
    tmp_path: Path, changes: dict[str, dict[str, Any]], codes: list[str]
) -> None:
    sections = {**changes, "data": {"partitions": 4, **changes.get("data", {})}}
    found = make_plan(tiny_config(tmp_path, tmp_path, **sections)).problems
    assert [problem.code for problem in found if problem.where == "data.partitions"] == codes


def test_held_out_sources_are_checked_too() -> None:
    assert problems("qwen2-0.5b", {"metadata": True}, held_out=True) == ["data.eval.sources[0].metadata"]


def plan_from(path: str, name: str = "qwen2.5-0.5b") -> Plan:
    return make_plan(
        Config.model_validate(
            {
                "run": {"name": "x"},
                "model": {"name": name, "path": path},
                "tokenizer": {"path": "t"},
                "data": {"sequence_length": 128, "sources": [{"path": "x", "format": "code"}]},
                "train": {"steps": 1},
            }
        )
    )


def test_a_revision_belongs_to_the_hub(tmp_path: Path) -> None:
    directory, hub_id = str(tmp_path), "Qwen/Qwen3-0.6B"
    with pytest.raises(ConfigError, match="revision belongs to a hub id in path"):
        tiny_config(tmp_path, tmp_path, model={"revision": "v1"})
    for path, codes in ((hub_id, []), (directory, ["revision-of-directory"] * 2)):
        (tmp_path / "tokenizer.json").touch()
        model = {"path": path, "config_overrides": {}, "revision": "v1"}
        tokenizer = {"path": path, "train": None, "revision": "v1"}
        found = _find_revision_problems(tiny_config(tmp_path, tmp_path, model=model, tokenizer=tokenizer))
        assert [each.code for each in found] == codes


def test_a_tokenizer_that_is_left_out_has_the_revision_of_the_weights() -> None:
    data = {
        "run": {"name": "x"},
        "train": {"steps": 1},
        "data": {"sequence_length": 32, "sources": [{"path": "x", "format": "text"}]},
    }
    model = {"path": "Qwen/Qwen3-0.6B", "revision": "v1"}
    config = parse_config(data | {"model": model}, "test")
    assert (config.tokenizer.path, config.tokenizer.revision) == ("Qwen/Qwen3-0.6B", "v1")
    given = parse_config(data | {"model": model, "tokenizer": {"path": "Qwen/Qwen3-0.6B"}}, "test")
    assert given.tokenizer.revision is None


@pytest.mark.parametrize(
    ("files", "code"),
    [
        ((), "no-model-config"),
        (("adapter_config.json", "adapter_model.safetensors"), "adapters-without-model"),
        (("config.json", "pytorch_model.bin"), "no-safetensors"),
        (("config.json", "model-00001-of-00002.safetensors"), None),
    ],
)
def test_a_directory_without_weights_that_can_be_loaded(
    tmp_path: Path, files: tuple[str, ...], code: str | None
) -> None:
    for name in files:
        (tmp_path / name).write_text(json.dumps({"model_type": "qwen2"}))
    found = plan_from(str(tmp_path)).problems
    assert [(problem.code, problem.where) for problem in found] == ([] if code is None else [(code, "model.path")])


@pytest.mark.parametrize(("path", "missing"), [("no/such/directory", True), ("Qwen/Qwen2.5-0.5B", False)])
def test_weights_that_are_not_on_this_machine_are_noted(path: str, *, missing: bool) -> None:
    assert any(note.startswith(f"There is no directory {path}") for note in plan_from(path).notes) == missing


def test_dropout_of_published_weights_is_in_the_plan(tmp_path: Path) -> None:
    def noted(plan: Plan) -> list[str]:
        return [note for note in plan.notes if "dropout" in note]

    assert noted(plan_from("Qwen/Qwen2.5-0.5B")) == []
    for name in ("bigcode/starcoderbase-1b", "bigcode/starcoder2-3b"):
        assert "a dropout of 0.1, which is set to 0" in noted(plan_from(name, name.partition("/")[2]))[0]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "starcoder2", "residual_dropout": 0.3}))
    (tmp_path / "model.safetensors").touch()
    plan = plan_from(str(tmp_path), "starcoder2-3b")
    assert "a dropout of 0.3, which is set to 0" in noted(plan)[0]
    assert plan.hf_config["residual_dropout"] == 0.0


def test_numbers_are_those_of_weights_that_are_here(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    for values, noted in (({}, []), ({"num_hidden_layers": 12}, ["qwen2.5-0.5b has 494,032,768 parameters; numbers"])):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2", **values}))
        found = [note for note in plan_from(str(tmp_path)).notes if "umbers are those" in note]
        assert [note.partition(" are those")[0] for note in found] == noted


def test_a_secret_in_the_configuration_is_noted(tmp_path: Path) -> None:
    environment = {"HF_TOKEN": "x", "NCCL_DEBUG": "WARN", "TOKENIZERS_PARALLELISM": "true"}
    config = tiny_config(tmp_path, tmp_path, cluster={"env": environment})
    [said] = [note for note in make_plan(config).notes if "cluster.env" in note]
    assert said.startswith("cluster.env.HF_TOKEN can be read in the run's directory")


def test_a_class_whose_isolation_is_not_tested_cannot_be_packed(tmp_path: Path) -> None:
    config, size = tiny_config(tmp_path, tmp_path), families.find_size("qwen3-0.6b")
    other = replace(size, family=replace(size.family, model_type="qwen4_exp", architecture="Qwen4ExpForCausalLM"))
    hf = families.resolve_hf_config(config)
    assert not find_problems(config, size, hf, 1)
    [problem] = find_problems(config, other, hf, 1)
    assert problem.where == "model.name"
    assert "could see each other in Qwen4ExpForCausalLM" in problem.what


@pytest.mark.parametrize(
    ("steps", "codes"),
    [([1, 1], []), ([2, 9], []), ([3, 2], ["profile-steps-reversed"]), ([9, 10], ["profile-beyond-end"])],
)
def test_steps_to_profile_lie_within_the_run_in_order(tmp_path: Path, steps: list[int], codes: list[str]) -> None:
    config = tiny_config(tmp_path, tmp_path, profile={"steps": steps})  # of 9 steps
    assert [problem.code for problem in make_plan(config).problems] == codes


@pytest.mark.parametrize(
    ("workers", "engine", "codes"),
    [
        (16, {"zero_hpz_partition_size": 8}, []),
        (16, {"zero_hpz_partition_size": 8, "zero_stage": 3, "offload": "optimizer"}, []),
        ([3, 16], {"zero_hpz_partition_size": 8}, []),
        (0, {"zero_hpz_partition_size": 8}, []),
        (12, {"zero_hpz_partition_size": 8}, ["hierarchy-workers"]),
        ([2, 3], {"zero_hpz_partition_size": 4}, ["hierarchy-workers"]),
        ([2, 4], {"zero_hpz_partition_size": 4, "sequence_parallel": 2}, []),
        ([2, 10], {"zero_hpz_partition_size": 6, "sequence_parallel": 2}, []),
        ([2, 10], {"zero_hpz_partition_size": 9, "sequence_parallel": 2}, ["hierarchy-workers"]),
        (16, {"zero_hpz_partition_size": 8, "zero_stage": 2}, ["hierarchy-stage"]),
        (16, {"zero_hpz_partition_size": 8, "offload": "optimizer_and_weights"}, ["hierarchy-offload"]),
        (16, {"deepspeed": {"zero_optimization": {"zero_hpz_partition_size": 8}}}, ["deepspeed-owned-key"]),
    ],
)
def test_a_second_partition_needs_stage_3_and_whole_groups(
    tmp_path: Path, workers: Any, engine: dict[str, Any], codes: list[str]
) -> None:
    batch = {"global_batch_size": 16}
    config = tiny_config(tmp_path, tmp_path, cluster={"workers": workers}, engine=engine, train=batch)
    plan = make_plan(config)
    assert [problem.code for problem in plan.problems] == codes
    if not codes:
        assert plan.zero == 3
        whole = make_plan(config, ranks=24).deepspeed["zero_optimization"]
        assert whole["zero_hpz_partition_size"] == engine["zero_hpz_partition_size"]
        odd = make_plan(config, ranks=15)
        assert "zero_hpz_partition_size" not in odd.deepspeed["zero_optimization"]


def test_without_ray_the_started_ranks_are_divided_into_groups(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, tmp_path, cluster={"workers": 0}, engine={"zero_hpz_partition_size": 4})
    for ranks, codes in ((None, []), (6, ["hierarchy-workers"]), (8, [])):
        assert [problem.code for problem in make_plan(config, ranks).problems] == codes


@pytest.mark.parametrize(
    ("model", "code"),
    [({"compile": True}, "hierarchy-compile"), ({"lora": {"quantize": "nf4"}}, "hierarchy-quantize")],
)
def test_a_second_partition_excludes_settings_that_exclude_stage_3(
    tmp_path: Path, model: dict[str, Any], code: str
) -> None:
    config = tiny_config(tmp_path, tmp_path, model=model, engine={"zero_hpz_partition_size": 2})
    found = {problem.code: problem.where for problem in make_plan(config).problems}
    assert found[code] == "engine.zero_hpz_partition_size"
    without = make_plan(tiny_config(tmp_path, tmp_path, model=model))
    assert code not in [problem.code for problem in without.problems]
