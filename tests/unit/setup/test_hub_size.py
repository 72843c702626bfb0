"""A hub id alone is enough: size, family and dimensions follow from the config.json that the hub gives at plan time."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from checkpoints import build_manifest
from hub_server import hub, silent_server, use_hub
from llm_training_toolkit.commands.init import StarterRequest, TrainingMachine, format_starter_config
from llm_training_toolkit.commands.plan import plan_run
from llm_training_toolkit.config import Config, dump_config_json, parse_config
from llm_training_toolkit.errors import DataError, PlanError
from llm_training_toolkit.families import FAMILIES, count_parameters, recall_plan
from llm_training_toolkit.plan import Plan, make_plan, with_precision
from llm_training_toolkit.runs.atomic_write import write_atomically
from llm_training_toolkit.runs.directory import RunDirectory
from llm_training_toolkit.setup import hub_weights
from llm_training_toolkit.setup.hub_weights import ask_for_size, ensure_known_size
from llm_training_toolkit.setup.resume import ResumeState, check_checkpoint_size
from tiny_models import DECODER, SHAPES, UNKNOWN_QWEN2

ID = "someone/My-Model"
QWEN3 = DECODER | {"vocab_size": 1024, "max_position_embeddings": 128}
QWEN3_5 = SHAPES["qwen3.5-4b"] | {"model_type": "qwen3_5_text", "vocab_size": 1024, "max_position_embeddings": 128}


@pytest.fixture(autouse=True)
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)


def hub_config(path: str = ID, *, precision: str = "fp32", **model: Any) -> Config:
    raw = {
        "run": {"name": "test", "dir": "no-such-directory"},
        "model": {"path": path, **model},
        "data": {"sequence_length": 64, "sources": [{"path": "x", "format": "text"}]},
        "train": {"steps": 10, "global_batch_size": 1, "precision": precision},
    }
    return parse_config(raw, "test")


def hub_files(values: dict[str, Any], family: str) -> dict[str, bytes]:
    tokens = [{"content": token} for token in FAMILIES[family].special_tokens.all]
    return {
        "config.json": json.dumps(values).encode(),
        "tokenizer.json": json.dumps({"added_tokens": tokens}).encode(),
        "model.safetensors": b"weights",
    }


@pytest.mark.parametrize(
    ("path", "values", "family"),
    [
        (ID, QWEN3, "qwen3"),
        (ID, UNKNOWN_QWEN2, "qwen2"),
        (ID, UNKNOWN_QWEN2, "qwen2.5"),
        (ID, UNKNOWN_QWEN2, "codeqwen1.5"),
        ("someone/qwen3-0.6b", QWEN3, "qwen3"),  # the name of a known size, of other dimensions
        (ID, {"model_type": "qwen3_5", "vision_config": {}, "text_config": QWEN3_5}, "qwen3.5"),
    ],
    ids=["qwen3", "qwen2", "qwen2.5", "codeqwen1.5", "known-name", "vision-language"],
)
def test_a_hub_id_alone_is_enough(
    path: str, values: dict[str, Any], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    with hub(path, hub_files(values, family), "models", asked) as endpoint:
        use_hub(endpoint, monkeypatch)
        plan, _ = plan_run(hub_config(path))
    assert plan.problems == ()
    assert (plan.model, plan.family) == (path.partition("/")[2], family)
    text = values.get("text_config", values)
    assert {key: plan.hf_config[key] for key in ("hidden_size", "vocab_size")} == {
        key: text[key] for key in ("hidden_size", "vocab_size")
    }
    assert plan.parameters == count_parameters(plan.hf_config) < 10_000_000
    assert "model.safetensors" not in asked

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert plan_run(hub_config(path))[0].parameters == plan.parameters


@pytest.mark.parametrize(
    ("path", "files", "token", "code"),
    [
        (ID, hub_files(QWEN3, "qwen3"), "needed", "hub-model-gated"),
        ("someone/My-Modell", hub_files(QWEN3, "qwen3"), "", "no-such-hub-model"),
        (ID, {"config.json": b"{}", "pytorch_model.bin": b"pickled"}, "", "no-safetensors"),
        (ID, {"model.safetensors": b"weights"}, "", "size-not-known"),
    ],
)
def test_a_size_that_the_hub_does_not_give_is_refused_with_its_reason(
    path: str, files: dict[str, bytes], token: str, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hub(ID, files, "models", token=token, is_listed=True) as endpoint:
        use_hub(endpoint, monkeypatch)
        with pytest.raises(PlanError) as refused:
            plan_run(hub_config(path))
    assert [problem.code for problem in refused.value.problems] == [code]


@pytest.mark.parametrize("offline", [False, True])
def test_without_a_network_an_unknown_name_is_refused_and_nothing_waits(
    offline: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_weights, "PLAN_PATIENCE_SECONDS", 0.2)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    with silent_server() as endpoint:
        use_hub(endpoint, monkeypatch)
        begin = time.monotonic()
        with pytest.raises(PlanError) as refused:
            ensure_known_size(hub_config("Qwen/Qwen3-0.6BB"))
    assert time.monotonic() - begin < 30
    (problem,) = refused.value.problems
    assert problem.code == "size-not-known"
    assert ("HF_HUB_OFFLINE" if offline else "0.2 s") in problem.what
    assert "qwen3-0.6b" in problem.fix


def test_a_rank_with_a_known_name_asks_no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    with hub("Qwen/Qwen3-0.6B", hub_files(QWEN3, "qwen3"), "models", asked) as endpoint:
        use_hub(endpoint, monkeypatch)
        ensure_known_size(hub_config("Qwen/Qwen3-0.6B"))
    assert asked == []


def begin_run(run: Path, config: Config, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """Plan a run by a hub's answer and write what its start leaves, then forget the answer."""
    with hub(ID, hub_files(QWEN3, "qwen3"), "models") as endpoint:
        use_hub(endpoint, monkeypatch)
        plan, _ = plan_run(config)
    run.mkdir(parents=True)
    (run / "resolved.json").write_text(dump_config_json(config))
    (run / "plan.json").write_text(json.dumps(plan.to_json()))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(run / "empty"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    return plan


@pytest.mark.parametrize("directory", ["s3://no-such-bucket/runs", "runs-of-another-folder"])
def test_a_begun_run_knows_its_size_from_its_directory_wherever_that_is(
    directory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = hub_config(name="My-Model")
    mirror = tmp_path / "mirror" / "renamed"
    plan = begin_run(mirror, config, monkeypatch)
    again = hub_config(name="my-model")  # the same name
    again = again.model_copy(update={"run": again.run.model_copy(update={"dir": directory})})
    with pytest.raises(PlanError):
        make_plan(again)
    recalled = recall_plan(again, RunDirectory(mirror).path)
    assert ask_for_size(recalled) is None
    assert make_plan(recalled, ranks=2).hf_config == plan.hf_config
    assert with_precision(recalled, "bf16").begun_plan == json.loads((mirror / "plan.json").read_text())
    assert dump_config_json(recalled) == dump_config_json(again)
    other = again.model_copy(update={"model": again.model.model_copy(update={"revision": "v2"})})
    assert recall_plan(other, mirror).begun_plan == {}


def test_dimensions_by_name_are_replaced_once_the_hub_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_weights, "PLAN_PATIENCE_SECONDS", 0.2)
    config = hub_config("someone/qwen3-0.6b")  # the name of a known size, of other dimensions
    config = config.model_copy(update={"run": config.run.model_copy(update={"dir": str(tmp_path)})})
    with silent_server() as endpoint:
        use_hub(endpoint, monkeypatch)
        assert ask_for_size(config) is not None
    assumed = make_plan(config)
    assert "hf_config" in assumed.estimated
    run = RunDirectory(tmp_path / config.run.name)
    write_atomically(run.resolved_config_path, dump_config_json(config))
    write_atomically(run.plan_path, json.dumps(assumed.to_json()))
    on_rank = make_plan(recall_plan(config, run.path))
    assert (on_rank.hf_config, "hf_config" in on_rank.estimated) == (assumed.hf_config, True)

    with pytest.raises(PlanError, match="once the hub answers"):
        check_checkpoint_size(ResumeState(build_manifest(3), config, None), assumed)

    monkeypatch.setattr(hub_weights, "PLAN_PATIENCE_SECONDS", 12.0)
    with hub("someone/qwen3-0.6b", hub_files(QWEN3, "qwen3"), "models") as endpoint:
        use_hub(endpoint, monkeypatch)
        assert ask_for_size(config) is not None
    plan = make_plan(config)
    assert plan.hf_config["hidden_size"] == QWEN3["hidden_size"]
    assert "hf_config" not in plan.estimated


def test_weights_alone_resume_a_run_that_began_with_their_name(tmp_path: Path) -> None:
    begun, again = hub_config("Qwen/Qwen2.5-7B", name="qwen2.5-7b"), hub_config("Qwen/Qwen2.5-7B")
    assert begun.model.name != again.model.name
    (tmp_path / "resolved.json").write_text(dump_config_json(begun))
    (tmp_path / "plan.json").write_text(json.dumps(make_plan(begun).to_json()))
    assert make_plan(recall_plan(again, tmp_path)).hf_config == make_plan(begun).hf_config
    assert recall_plan(again, tmp_path).begun_plan != {}


def test_a_tokenizer_that_cannot_be_had_is_a_note_of_the_plan_and_an_error_of_a_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    raw = json.loads(dump_config_json(hub_config()))
    config = parse_config(raw | {"tokenizer": {"path": "someone/absent"}}, "test")
    with hub(ID, hub_files(QWEN3, "qwen3"), "models") as endpoint:
        use_hub(endpoint, monkeypatch)
        plan, _ = plan_run(config)
        with pytest.raises(DataError, match="someone/absent"):
            ask_for_size(config)
    assert plan.family == "qwen3"
    assert any("someone/absent" in note and "assumed" in note for note in plan.notes)


def test_another_name_than_that_of_the_weights_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with hub(ID, hub_files(QWEN3, "qwen3"), "models") as endpoint:
        use_hub(endpoint, monkeypatch)
        with pytest.raises(PlanError, match=r"model\.name = qwen3-0\.6bb"):
            plan_run(hub_config(name="qwen3-0.6bb"))


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize(
    ("saved", "precision", "is_rounded"),
    [("float16", "bf16", True), ("float32", "bf16", True), ("float16", "fp32", False), ("bfloat16", "bf16", False)],
)
def test_weights_that_the_precision_rounds_are_noted(
    key: str, saved: str, precision: str, is_rounded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hub(ID, hub_files(QWEN3 | {key: saved}, "qwen3"), "models") as endpoint:
        use_hub(endpoint, monkeypatch)
        plan, _ = plan_run(hub_config(precision=precision))
    assert any(f"saved in {saved} are rounded to bfloat16" in note for note in plan.notes) == is_rounded


def test_quantized_weights_are_refused_at_plan_time(monkeypatch: pytest.MonkeyPatch) -> None:
    values = QWEN3 | {"quantization_config": {"quant_method": "fp8"}}
    with hub("Qwen/Qwen3-0.6B-FP8", hub_files(values, "qwen3"), "models") as endpoint:
        use_hub(endpoint, monkeypatch)
        plan, _ = plan_run(hub_config("Qwen/Qwen3-0.6B-FP8"))
    assert [problem.code for problem in plan.problems] == ["quantized-weights"]


def test_a_starter_configuration_for_a_hub_id_of_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with hub(ID, hub_files(QWEN3, "qwen3"), "models") as endpoint:
        use_hub(endpoint, monkeypatch)
        text = format_starter_config(StarterRequest("code", ID, "code/"), TrainingMachine(0, 16.0))
    assert f"path: {ID}" in text
    assert "fim" in text
    assert make_plan(hub_config()).problems == ()
