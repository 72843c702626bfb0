"""`ltt plan --search`: candidates fit by the estimate, none is faster than the fastest, and its line can be used."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from llm_training_toolkit.cli.app import app
from llm_training_toolkit.config.schema import Config, Offload
from llm_training_toolkit.errors import PlanError
from llm_training_toolkit.plan import ClusterHardware, estimate_on_cluster, make_plan
from llm_training_toolkit.plan.forecast.cluster_estimate import get_worker_memory_gb
from llm_training_toolkit.plan.forecast.offload import estimate_host_seconds
from llm_training_toolkit.plan.forecast.settings_search import SettingsSearch, list_worker_counts, search_settings
from llm_training_toolkit.plan.memory.memory_settings import MEMORY_FILL, list_memory_settings
from llm_training_toolkit.plan.plan import plan_workload
from unit.plan.forecast.test_cluster_estimate import CLUSTER, config, hardware

LARGE: dict[str, Any] = {"model": {"name": "qwen2.5-7b"}, "data": {"sequence_length": 4096}}


def search(given: Config, there: ClusterHardware) -> SettingsSearch:
    return search_settings(given, make_plan(given), there)


def test_a_seven_billion_model_on_one_gpu_needs_its_optimizer_in_host_memory() -> None:
    found = search(config(**LARGE, train={"global_batch_size": 64}), hardware(nodes=1))
    one, all_eight = found.by_workers[0], found.by_workers[-1]
    assert one.workers == 1
    assert one.offload != "none"
    assert one.host_gb_per_node > 16 * 7.6, "16 bytes for each weight"
    assert one.memory_gb < 80
    assert (all_eight.workers, all_eight.offload) == (8, "none")
    assert found.fastest is all_eight
    assert 0 < found.fitting < found.tried


def test_nothing_fits() -> None:
    tiny = hardware(nodes=1, devices_per_node=1, memory_gb=8, cpus=8)
    found = search(config(**LARGE), tiny)
    assert (found.fitting, found.by_workers, found.fastest, found.cheapest) == (0, (), None, None)


@settings(max_examples=8)
@given(
    batch=st.integers(1, 40),
    memory_gb=st.sampled_from([24, 48, 80, 141]),
    nodes=st.integers(1, 3),
    name=st.sampled_from(["qwen3-0.6b", "qwen2.5-3b", "starcoder2-7b"]),
    lora=st.sampled_from([None, {"rank": 8}]),
)
def test_every_candidate_fits_and_none_is_faster(
    batch: int, memory_gb: int, nodes: int, name: str, lora: dict[str, int] | None
) -> None:
    there = hardware(nodes=nodes, memory_gb=memory_gb, utilisation=None)
    given = config(model={"name": name, "lora": lora}, train={"global_batch_size": batch})
    found = search(given, there)
    counts = list_worker_counts(given, there)
    assert counts[0] == 1
    assert counts[-1] == min(8 * batch, 8 * nodes)
    assert {each.workers for each in found.by_workers} <= set(counts)
    for each in found.by_workers:
        assert each.memory_gb <= 0.9 * memory_gb


def test_rows_too_long_for_a_device_are_shared_by_more_workers_than_sequences() -> None:
    found = search(config(**LARGE | {"data": {"sequence_length": 131072}}, train={"global_batch_size": 2}), hardware())
    assert found.fastest is not None
    assert found.fastest.workers == 8
    assert found.fastest.replica == (4, 1)
    assert "engine.sequence_parallel=4" in found.fastest.overrides


def test_replicas_that_a_run_asks_for_are_kept_and_impossible_ones_are_left_out() -> None:
    asked = search(config(**LARGE, engine={"tensor_parallel": 2}), hardware(nodes=1))
    assert {each.replica for each in asked.by_workers} == {(1, 2)}
    assert {each.settings.zero for each in asked.by_workers} <= {0, 1}
    single = search(config(model={"name": "starcoderbase-1b"}), hardware(nodes=1))  # one key-value head
    assert {each.replica for each in single.by_workers} == {(1, 1)}


def list_step_seconds(given: Config, there: ClusterHardware, workers: int) -> Iterator[float]:
    """Seconds of a step with every combination that fits."""
    for offload in get_args(Offload):
        engine = given.engine.model_copy(update={"offload": offload, "zero_stage": "auto"})
        cluster = given.cluster.model_copy(update={"workers": workers})
        opened = given.model_copy(update={"engine": engine, "cluster": cluster})
        load = plan_workload(opened, workers)
        for combination in list_memory_settings(opened, workers):
            applied = combination.apply_to_config(opened)
            if combination.estimate_bytes(load) <= MEMORY_FILL * 1e9 * get_worker_memory_gb(applied, there):
                made = make_plan(applied)
                estimate = estimate_on_cluster(applied, made, there)
                if not (made.problems or estimate.problems):
                    yield estimate.step_seconds


@pytest.mark.parametrize(("length", "link"), [(256, 450), (2048, 10)])  # short passes, slow links
def test_no_combination_that_fits_is_faster_than_the_found_ones(length: int, link: int) -> None:
    links = {"within_node": link, "between_nodes": link, "storage": 2}
    there = hardware(nodes=1, devices_per_node=4, memory_gb=24, utilisation=None, bandwidth_gb_per_s=links)
    given = config(
        model={"name": "qwen3-0.6b", "activation_checkpointing": "auto"},
        data={"sequence_length": length},
        train={"global_batch_size": 16, "micro_batch_size": "auto"},
    )
    found = search(given, there)
    assert [each.workers for each in found.by_workers] == [1, 2, 4]
    for each in found.by_workers:
        every = list(list_step_seconds(given, there, each.workers))
        assert len(every) > 10
        assert each.estimate.step_seconds <= 1.05 * min(every)


@pytest.mark.parametrize(
    ("replica", "sequences", "nodes", "counts"),
    [(4, 2, 2, [4, 8]), (3, 64, 1, [3, 6]), (3, 64, 2, [3, 6, 15]), (16, 64, 2, [16]), (16, 64, 1, [])],
)
def test_workers_make_whole_replicas(replica: int, sequences: int, nodes: int, counts: list[int]) -> None:
    given = config(engine={"sequence_parallel": replica}, train={"global_batch_size": sequences})
    assert list_worker_counts(given, hardware(nodes=nodes)) == counts


def test_a_search_mends_a_second_partition_that_does_not_divide_the_workers() -> None:
    given = config(model={"name": "qwen3-0.6b"}, cluster={"workers": 4}, engine={"zero_hpz_partition_size": 8})
    assert [problem.code for problem in make_plan(given).problems] == ["hierarchy-workers"]
    assert [each.workers for each in search(given, hardware()).by_workers] == [8, 16]


def test_the_line_of_overrides_has_the_figures_of_the_search(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(config(**LARGE).model_dump(mode="json", exclude_unset=True)))
    cluster = CLUSTER / "aws-h100.yaml"
    done = CliRunner().invoke(app, ["plan", str(file), "--cluster", str(cluster), "--search", "--json"])
    assert done.exit_code == 0, done.output
    fastest = json.loads(done.stdout)["search"]["fastest"]
    again = CliRunner().invoke(app, ["plan", str(file), "--cluster", str(cluster), "--json", *fastest["overrides"]])
    assert again.exit_code == 0, again.output
    plan = json.loads(again.stdout)
    assert plan["cluster"]["seconds_per_step"] == pytest.approx(fastest["seconds_per_step"])
    assert sum(plan["memory_gb_per_device"].values()) == pytest.approx(fastest["memory_gb_per_device"], rel=1e-3)
    assert plan["hours"] == pytest.approx(fastest["hours"])
    table = CliRunner().invoke(app, ["plan", str(file), "--cluster", str(cluster), "--search"])
    assert table.exit_code == 0
    assert f"fastest   {' '.join(fastest['overrides'])}" in table.stdout


def test_a_search_needs_a_cluster_and_a_configuration_without_other_problems(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(config(**LARGE).model_dump(mode="json", exclude_unset=True)))
    assert CliRunner().invoke(app, ["plan", str(file), "--search"]).exit_code != 0
    broken = config(model={"name": "qwen3-0.6b"}, optim={"warmup": 1000}, train={"steps": 10, "tokens": None})
    with pytest.raises(PlanError) as caught:
        search(broken, hardware())
    assert {problem.where for problem in caught.value.problems} == {"optim.warmup"}


def test_the_update_in_host_memory_takes_the_published_time_and_is_shared_by_nodes() -> None:
    parameters = 6_740_000_000
    added = estimate_host_seconds("optimizer", parameters, 1)
    assert 64 / (64 / 4.45 + added) == pytest.approx(2.05), "sequences a second with offload_optimizer"
    assert estimate_host_seconds("optimizer", parameters, 4) == pytest.approx(added / 4)
    assert estimate_host_seconds("none", parameters, 1) == 0
    given = config(**LARGE, cluster={"workers": 1}, engine={"offload": "optimizer", "zero_stage": 1})
    one = estimate_on_cluster(given, make_plan(given), hardware(memory_gb=141))
    assert one.step_seconds == pytest.approx(
        max(one.compute_seconds, one.overlapped_seconds) + one.exposed_seconds + one.host_seconds
    )
    assert one.host_seconds > 1
