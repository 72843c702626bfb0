"""A plan on a cluster: time and money by hand, what fits and what does not, and where the numbers are shown."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from llm_training_toolkit.cli.app import app
from llm_training_toolkit.commands.plan import read_measured_speed
from llm_training_toolkit.config.schema import Config
from llm_training_toolkit.plan import (
    ClusterEstimate,
    ClusterHardware,
    estimate_on_cluster,
    format_plan,
    make_plan,
)
from llm_training_toolkit.runs.attempts import begin_attempt
from llm_training_toolkit.runs.directory import RunDirectory

CLUSTER = Path(__file__).parents[4] / "cluster"

RECOMPUTED: dict[str, Any] = {"model": {"activation_checkpointing": "full"}}
FEW = {"num_hidden_layers": 1}


def hardware(**changes: Any) -> ClusterHardware:
    """Two nodes with eight H100 each, round prices."""
    facts: dict[str, Any] = {
        "nodes": 2,
        "device": "H100",
        "devices_per_node": 8,
        "memory_gb": 80,
        "cpus": 192,
        "tflops": {"bf16": 989, "fp32": 67},
        "utilisation": 0.34,
        "bandwidth_gb_per_s": {"within_node": 450, "between_nodes": 400, "storage": 2},
        "price_per_hour": {"node": 50, "head": 1, "date": "2026-11-22"},
        "spot": False,
        "shared_storage": "/shared",
    }
    return ClusterHardware.model_validate({**facts, **changes}, strict=True)


@pytest.mark.parametrize(
    ("name", "lora", "flops", "trained_share"),
    [
        ("qwen3.5-9b", None, 48.6e9, 1.0),
        ("qwen3-30b-a3b", {"rank": 16}, None, 0.001),
        ("qwen3-coder-next", {"rank": 16}, None, 0.001),
    ],
)
def test_todays_models_on_a_node_of_eight_gpus_with_141_gb(
    name: str, lora: dict[str, int] | None, flops: float | None, trained_share: float
) -> None:
    node = hardware(nodes=1, device="H200", memory_gb=141)
    given = config(
        model={"name": name, "activation_checkpointing": "full", "lora": lora},
        data={"sequence_length": 2048},
        cluster={"workers": 8},
    )
    plan = make_plan(given)
    found = estimate_on_cluster(given, plan, node)
    assert found.problems == plan.problems == ()
    assert sum(plan.memory_gb_per_device.values()) < 0.5 * 141
    assert sum(plan.memory_gb_per_device.values()) > 2 * plan.parameters / 8 / 1e9, "a shard of the weights"
    assert found.hours is not None
    assert found.cost_usd == pytest.approx(51 * found.hours)
    assert flops is None or plan.flops_per_token == pytest.approx(flops, rel=0.01)
    assert found.checkpoint_gb == pytest.approx(12 * plan.trainable_parameters / 1e9)
    assert plan.trainable_parameters <= trained_share * plan.parameters


@pytest.mark.parametrize(
    ("model", "engine", "named"),
    [
        ({}, {}, "Take more|model.lora |engine.offload|smaller model"),
        ({}, {"zero_stage": 1}, "Raise it|model.lora |engine.offload|smaller model"),
        ({"lora": {"rank": 16}}, {}, "Take more|engine.offload|smaller model"),
        ({"name": "qwen3-32b", "lora": {"rank": 16}}, {}, "Take more|quantize: nf4|engine.offload|smaller model"),
        ({}, {"offload": "optimizer"}, "Take more|model.lora |smaller model"),
    ],
)
def test_too_large_a_model_is_told_each_way_to_less_memory(
    model: dict[str, Any], engine: dict[str, Any], named: str
) -> None:
    sections = {"model": {"name": "qwen3-coder-next", "activation_checkpointing": "full", **model}, "engine": engine}
    problem = seen(hardware(nodes=1, memory_gb=10), **sections, cluster={"workers": 8}).problems[-1]
    assert problem.code == "out-of-memory"
    assert [part in problem.fix for part in named.split("|")] == [True] * len(named.split("|"))
    assert len(problem.fix.split("; or ")) == len(named.split("|"))


def cores(number: int, **changes: Any) -> ClusterHardware:
    """One machine with cores and no GPU."""
    facts = {"nodes": 1, "device": "cpu", "devices_per_node": number, "cpus": number, "memory_gb": 4}
    return hardware(**{**facts, "tflops": {"bf16": 1.0, "fp32": 0.1}, **changes})


def config(**sections: Any) -> Config:
    """Qwen3 8B on two billion tokens, 16 workers, ZeRO 3 with activation checkpointing off."""
    raw: dict[str, Any] = {
        "run": {"name": "test"},
        "model": {"name": "qwen3-8b"},
        "tokenizer": {"path": "tokenizer"},
        "data": {"sequence_length": 4096, "sources": [{"path": "x", "format": "code"}]},
        "train": {"tokens": 2_000_000_000, "global_batch_size": 64, "micro_batch_size": 1},
        "engine": {"zero_stage": 3},
        "cluster": {"workers": 16},
    }
    for name, section in sections.items():
        raw[name] = {**raw.get(name, {}), **section}
    return Config.model_validate_json(json.dumps(raw), strict=True)


def seen(facts: ClusterHardware, **sections: Any) -> ClusterEstimate:
    read = config(**sections)
    return estimate_on_cluster(read, make_plan(read), facts)


def where(forecast: ClusterEstimate) -> list[str]:
    return [problem.where for problem in forecast.problems]


def test_time_and_cost_by_hand() -> None:
    # Matrices of a layer 2 x 4096 x (4096 + 1024) + 3 x 4096 x 12288, 36 of them, the output layer 151936 x 4096:
    # 7,568,097,280; attention 12 x 36 x 4096 x 4096. Steps: 488,282 sequences in batches of 64.
    flops = 6 * 7_568_097_280 + 12 * 36 * 4096 * 4096
    computing = flops * 64 * 4096 / (16 * 0.34 * 989e12)
    # Stage 3 reduces gradients while devices wait: fp32, four micro-batches, over the 400 GB/s of a node.
    waiting = 4 * 4 * make_plan(config()).parameters * 15 / 16 / 400e9
    hours = 7_630 * (computing + waiting) / 3600
    assert hours == pytest.approx(5.438 + 0.651, abs=1e-3)
    forecast = seen(hardware())
    assert not forecast.problems
    assert forecast.nodes == 2
    assert forecast.hours == pytest.approx(hours)
    assert forecast.cost_usd == pytest.approx(hours * (2 * 50 + 1))
    assert forecast.compute_seconds == pytest.approx(computing)
    assert forecast.exposed_seconds == pytest.approx(waiting)
    assert 0 < forecast.overlapped_seconds < computing


def test_precision_and_recomputation_take_longer() -> None:
    usual = seen(hardware()).compute_seconds
    in_fp32 = seen(hardware(memory_gb=999), train={"precision": "fp32"}).compute_seconds
    assert in_fp32 == pytest.approx(usual * 989 / 67)
    recomputed = seen(hardware(), model={"activation_checkpointing": "full"}).compute_seconds
    assert recomputed == pytest.approx(usual * 4 / 3)
    assert seen(hardware(utilisation=0.17)).compute_seconds == pytest.approx(usual * 2)


def test_a_step_takes_the_larger_of_computing_and_sending_beside_it_and_what_waits() -> None:
    slow = hardware(bandwidth_gb_per_s={"within_node": 450, "between_nodes": 10, "storage": 2})
    usual, hidden = seen(slow), seen(slow, engine={"deepspeed": {"zero_optimization": {"overlap_comm": True}}})
    assert usual.step_seconds == pytest.approx(
        max(usual.compute_seconds, usual.overlapped_seconds) + usual.exposed_seconds
    )
    assert usual.overlapped_seconds > usual.compute_seconds
    assert hidden.exposed_seconds == 0
    assert hidden.overlapped_seconds == pytest.approx(usual.communication_seconds)
    after = seen(slow, engine={"zero_stage": 1, "deepspeed": {}})
    assert after.overlapped_seconds == 0


def test_without_a_measured_utilisation_it_is_estimated() -> None:
    found, wide = (
        seen(hardware(memory_gb=999, utilisation=None), model={"name": name}) for name in ("qwen3-8b", "qwen3-32b")
    )
    assert 0.25 < found.utilisation < 0.45
    assert wide.utilisation > found.utilisation
    unknown = seen(hardware(memory_gb=999, utilisation=None, device="a card of tomorrow"))
    assert unknown.utilisation > found.utilisation, "with the ratio of bandwidth and peak between A100 and H100"
    short: dict[str, Any] = {"data": {"sequence_length": 128}}
    launching = seen(hardware(memory_gb=999, utilisation=None), **short)
    assert launching.compute_seconds == pytest.approx(4 * 36 * 0.0125 * 0.75), "four passes of 36 layers"
    assert launching.utilisation < 0.1


@pytest.mark.parametrize(
    ("workers", "rows", "passes"),
    [(16, 1, 4), (16, 3, 2), (16, 4, 1), (16, 9, 1), (12, 5, 2)],
)
def test_a_step_has_whole_passes(workers: int, rows: int, passes: int) -> None:
    """Of 36 layers that take as long as their kernels are launched, however few sequences a pass has."""
    found = seen(
        hardware(memory_gb=999, utilisation=None),
        data={"sequence_length": 64},
        train={"micro_batch_size": rows},
        cluster={"workers": workers},
    )
    assert found.compute_seconds == pytest.approx(passes * 36 * 0.0125 * 0.75)


@given(st.sampled_from([1, 2, 4, 8, 16]))
def test_more_workers_take_less_time_and_as_many_device_hours(workers: int) -> None:
    forecast = seen(hardware(memory_gb=999), cluster={"workers": workers})
    one = seen(hardware(memory_gb=999), cluster={"workers": 1})
    assert forecast.compute_seconds * workers == pytest.approx(one.compute_seconds)
    assert forecast.nodes == (2 if workers == 16 else 1)


def test_only_nodes_that_are_taken_are_paid() -> None:
    assert seen(hardware(memory_gb=999), cluster={"workers": 8}).usd_per_hour == 51
    assert seen(hardware(memory_gb=999), cluster={"workers": 9}).usd_per_hour == 101
    assert seen(hardware(memory_gb=999), cluster={"workers": 2, "placement_strategy": "spread"}).usd_per_hour == 101


def test_an_unknown_length_has_neither_time_nor_cost() -> None:
    forecast = seen(hardware(), train={"tokens": None, "epochs": 1})
    assert (forecast.hours, forecast.cost_usd) == (None, None)
    assert forecast.compute_seconds > 0


def test_what_is_sent_by_hand() -> None:
    read = config()
    parameters = make_plan(read).parameters
    # Rings enter and leave a node once: its 400 GB/s are slower than a device's 450. Four micro-batches of a sequence.
    share, link = 15 / 16, 400e9
    kept = 4 * 2 * 500_000_000  # weights that stage 3 keeps from forward to backward: half of the reuse distance
    sharded = 4 * (4 + 4) * parameters - kept
    sent = {0: 8 * parameters, 1: 6 * parameters, 2: (4 * 8 + 2) * parameters, 3: sharded}
    for zero, size in sent.items():
        found = seen(hardware(memory_gb=999), engine={"zero_stage": zero}).communication_seconds
        assert found == pytest.approx(size * share / link)
    within = seen(hardware(memory_gb=999), cluster={"workers": 8}).communication_seconds
    assert within == pytest.approx((8 * (4 + 4) * parameters - 2 * kept) * (7 / 8) / 450e9)
    assert seen(hardware(memory_gb=999), cluster={"workers": 1}).communication_seconds == 0
    slow = {"bandwidth_gb_per_s": {"within_node": 32, "between_nodes": 50, "storage": 2}}
    assert seen(hardware(**slow, memory_gb=999)).communication_seconds == pytest.approx(sharded * share / 32e9)
    apart = {"workers": 2, "placement_strategy": "spread"}
    found = seen(hardware(**slow, memory_gb=999), cluster=apart).communication_seconds
    assert found == pytest.approx(8 * sharded / 2 / 50e9)


def test_a_second_partition_sends_between_nodes_once_a_step() -> None:
    slow = hardware(bandwidth_gb_per_s={"within_node": 450, "between_nodes": 10, "storage": 2})
    batch = {"global_batch_size": 64, "micro_batch_size": 1}
    without = seen(slow, train=batch)
    within = seen(slow, train=batch, engine={"zero_hpz_partition_size": 8})
    assert within.overlapped_seconds < without.overlapped_seconds / 6, "four micro-batches gather twice each"
    thirds = seen(slow, train=batch, cluster={"workers": 15}, engine={"zero_hpz_partition_size": 3})
    assert thirds.overlapped_seconds > within.overlapped_seconds, "groups of three do not fill a node of eight"


def test_tokens_of_rows_that_workers_share_pass_within_a_node_by_hand() -> None:
    alone, shared = (
        seen(hardware(memory_gb=999), engine={"zero_stage": 1, "sequence_parallel": each}).exposed_seconds
        for each in (1, 8)
    )
    # 32 micro-batches of 512 tokens for each worker; 36 layers, forward and backward, bf16.
    sent = 32 * 512 * 36 * 2 * 2 * (2 * 32 * 128 + 2 * 8 * 128)
    assert shared - alone == pytest.approx(sent * (7 / 8) / 450e9)


def test_adapters_take_less_work_and_send_less() -> None:
    lora: dict[str, Any] = {"model": {"path": "weights", "lora": {"rank": 16}}, "engine": {"zero_stage": 2}}
    plan = make_plan(config(**lora))
    full, beside = seen(hardware(memory_gb=999)), seen(hardware(memory_gb=999), **lora)
    assert 4 / 6 < beside.compute_seconds / full.compute_seconds < 0.8
    assert beside.communication_seconds == pytest.approx((4 * 8 + 2) * plan.trainable_parameters * 15 / 16 / 400e9)
    checkpointed = {**lora, "model": {**lora["model"], **RECOMPUTED["model"]}}
    recomputed = seen(hardware(memory_gb=999), **checkpointed).compute_seconds
    # The forward pass of the whole model once more.
    assert recomputed == pytest.approx(beside.compute_seconds + full.compute_seconds / 3)
    assert beside.checkpoint_gb == pytest.approx(12 * plan.trainable_parameters / 1e9)


def test_links_that_decide_are_said() -> None:
    slow = {"bandwidth_gb_per_s": {"within_node": 450, "between_nodes": 10, "storage": 2}}
    assert any("longer than computing" in note for note in seen(hardware(**slow)).notes)
    assert not any("longer than computing" in note for note in seen(hardware()).notes)


def test_a_checkpoint_by_hand() -> None:
    forecast = seen(hardware())
    assert forecast.checkpoint_gb == pytest.approx(12 * make_plan(config()).parameters / 1e9)
    assert forecast.checkpoint_seconds == pytest.approx(forecast.checkpoint_gb / 2)


@pytest.mark.parametrize(
    ("facts", "sections", "key", "words"),
    [
        (
            hardware(),
            {"cluster": {"workers": 17}},
            "cluster.workers",
            "17 workers .* 16 workers on 2 nodes with 8 H100",
        ),
        (hardware(cpus=16), {"cluster": {"cpus_per_worker": 4}}, "cluster.workers", "holds, which is 8 workers"),
        (hardware(cpus=2), {"cluster": {"cpus_per_worker": 4}}, "cluster.cpus_per_worker", "fits into no node"),
        (hardware(), {"cluster": {"placement_strategy": "strict_pack"}}, "cluster.workers", "all on one node"),
        (
            hardware(),
            {"cluster": {"placement_strategy": "strict_spread"}},
            "cluster.workers",
            "each on a node of its own",
        ),
        (hardware(), {"cluster": {"gpus_per_worker": 0}}, "cluster.gpus_per_worker", "trains on the cores"),
        (
            hardware(memory_gb=24),
            {},
            "model.activation_checkpointing",
            "H100 has 22.5 GB for it; the largest part is activations",
        ),
        (hardware(), {"train": {"micro_batch_size": 4}}, "train.micro_batch_size", "the largest part is activations"),
        (
            hardware(memory_gb=16),
            RECOMPUTED,
            "cluster.workers",
            "H100 has 14.5 GB for it; the largest part is gradients",
        ),
        (hardware(), {**RECOMPUTED, "engine": {"zero_stage": 0}}, "engine.zero_stage", "the largest part is optimizer"),
        (
            hardware(),
            {
                "model": {"activation_checkpointing": "full", "config_overrides": FEW},
                "data": {"sequence_length": 2_000_000},
            },
            "data.sequence_length",
            "the largest part is activations",
        ),
        (
            hardware(memory_gb=12),
            {"model": {"loss_chunk_size": 0, "config_overrides": FEW}, "data": {"sequence_length": 16_384}},
            "model.loss_chunk_size",
            "the largest part is logits",
        ),
        (hardware(), {"cluster": {"workers": 0}}, "cluster.workers", "without Ray"),
        (cores(64, memory_gb=99), {"cluster": {"gpus_per_worker": 1}}, "cluster.gpus_per_worker", "no GPUs"),
    ],
)
def test_what_does_not_fit_is_said_in_words(
    facts: ClusterHardware, sections: dict[str, Any], key: str, words: str
) -> None:
    forecast = seen(facts, **sections)
    assert where(forecast) == [key]
    assert re.search(words, str(forecast.problems[0]))
    assert forecast.problems[0].fix
    assert (forecast.hours, forecast.cost_usd) == (None, None)


def test_on_cpu_every_core_is_a_device() -> None:
    small: dict[str, Any] = {"model": {"name": "qwen3-0.6b"}, "data": {"sequence_length": 1024}}
    eight = seen(cores(8), **small, cluster={"workers": 2, "cpus_per_worker": 4})
    assert not eight.problems
    four = seen(cores(8, memory_gb=8), **small, cluster={"workers": 2, "cpus_per_worker": 2})
    assert four.compute_seconds == pytest.approx(2 * eight.compute_seconds)
    assert where(seen(cores(7), **small, cluster={"workers": 2, "cpus_per_worker": 4})) == ["cluster.workers"]
    short = seen(cores(8, memory_gb=2), **small, cluster={"workers": 2, "cpus_per_worker": 4})
    assert "GB a worker, and cpu has 4.42 GB for it" in short.problems[0].what


def test_notes() -> None:
    auto = " ".join(seen(hardware(spot=True), train={"micro_batch_size": "auto"}).notes)
    assert "micro_batch_size: auto takes about 1 there" in auto
    assert "spot" in auto
    needed = sum(make_plan(config()).memory_gb_per_device.values())
    assert any("is tight" in note for note in seen(hardware(memory_gb=needed * 1.05)).notes)
    assert not any("is tight" in note for note in seen(hardware(memory_gb=needed * 1.2)).notes)
    assert "evaluation, copies for checkpoints" in seen(hardware()).notes[-1]


def test_a_begun_run_on_the_same_gpus_gives_the_speed(tmp_path: Path) -> None:
    given = config(run={"dir": str(tmp_path)})
    assert read_measured_speed(given) is None
    run = tmp_path / "test"
    run.mkdir()
    # Short documents: a third of the FLOPs that the plan counts for as many tokens.
    plan, node = make_plan(given), hardware(utilisation=None)
    per_second = 0.25 * 989e12 / (plan.flops_per_token / 3)
    begin_attempt(RunDirectory(run), {"workers": 4})
    rows: list[dict[str, Any]] = [
        {"step": step, "attempt": 1, "perf/tokens_per_second": 4 * per_second * mfu / 0.25}
        | {"perf/mfu": mfu, "perf/tflops": 989 * mfu}
        for step, mfu in enumerate((0.1, 0.3, 0.25))
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    speed = read_measured_speed(given)
    assert speed is not None
    assert (speed.mfu, speed.run) == (0.25, "test")
    assert speed.peak_flops == pytest.approx(989e12)
    assert speed.tokens_per_second == pytest.approx(per_second)
    found = estimate_on_cluster(given, plan, node, speed)
    assert found.measured
    assert found.utilisation == pytest.approx(0.25)
    assert found.step_seconds == pytest.approx(plan.flops_per_token / 3 * plan.tokens_per_step / (16 * 0.25 * 989e12))
    assert "test in its newest steps" in found.notes[0]
    other = hardware(utilisation=None, device="A100", tflops={"bf16": 312, "fp32": 19.5})
    for facts in (other, hardware()):
        assert estimate_on_cluster(given, plan, facts, speed) == estimate_on_cluster(given, plan, facts)


def test_the_text_shows_the_cluster_the_time_and_the_cost() -> None:
    read = config()
    forecast = estimate_on_cluster(read, make_plan(read), hardware())
    text = "\n".join(format_plan(forecast.add_to_plan(make_plan(read)), forecast))
    assert "2 of 2 nodes, each with 8 H100 (80 GB), on demand" in text
    assert "about 6.09 hours, if devices reach 34% of their peak" in text
    assert "about $615 at $101.00 an hour: 2 nodes at $50.00, the head at $1.00; prices of 2026-11-22" in text
    small = seen(hardware(nodes=1))
    shown = "\n".join(format_plan(small.add_to_plan(make_plan(read)), small))
    assert shown.count("it does not fit there") == 2
    assert "PROBLEM" in shown


def run_plan(file: Path, *arguments: str) -> Any:
    """`ltt plan FILE ARGUMENTS`."""
    return CliRunner().invoke(app, ["plan", str(file), *arguments])


def test_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    raw = config(
        train={"global_batch_size": 8, "micro_batch_size": 4}, cluster={"workers": 2}, model={"name": "qwen3-0.6b"}
    )
    file.write_text(json.dumps(raw.model_dump(mode="json", exclude_unset=True)))
    alone = json.loads(run_plan(file, "--json").stdout)
    assert (alone["hours"], alone["cost"]) == (None, None)
    assert "hours" not in alone["estimated"]

    cluster = ["--cluster", str(CLUSTER / "local.yaml")]
    done = run_plan(
        file, *cluster, "--json", "model.config_overrides={num_hidden_layers: 2}", "data.sequence_length=256"
    )
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["hours"] > 0
    assert found["cost"] == 0
    assert {"hours", "cost"} <= set(found["estimated"])
    assert found["cluster"]["hardware"]["device"] == "cpu"

    done = run_plan(file, *cluster, "--json", "cluster.workers=8")
    assert done.exit_code == 2
    found = json.loads(done.stdout)
    assert "cluster.workers" in [problem["where"] for problem in found["problems"]]
    assert (found["hours"], found["cost"]) == (None, None)


def test_an_elastic_run_takes_what_fits_and_only_its_fewest_workers_must() -> None:
    elastic, fixed = (
        seen(hardware(nodes=1), cluster={"workers": [4, 64]}),
        seen(hardware(nodes=1), cluster={"workers": 8}),
    )
    assert not [problem for problem in elastic.problems if problem.where == "cluster.workers"]
    assert (elastic.nodes, elastic.compute_seconds) == (fixed.nodes, fixed.compute_seconds)
    assert where(seen(hardware(nodes=1), cluster={"workers": [9, 64]})) == ["cluster.workers"]


def test_an_elastic_run_is_estimated_with_the_second_partition_of_its_size_there() -> None:
    slow = hardware(bandwidth_gb_per_s={"within_node": 450, "between_nodes": 10, "storage": 2})
    batch = {"global_batch_size": 64, "micro_batch_size": 1}
    sizes = {"train": batch, "engine": {"zero_hpz_partition_size": 8}}
    elastic, fixed = (seen(slow, **sizes, cluster={"workers": workers}) for workers in ([8, 20], 16))
    assert elastic.nodes == fixed.nodes == 2
    assert elastic.overlapped_seconds == pytest.approx(fixed.overlapped_seconds)
