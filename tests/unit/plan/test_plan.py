"""The plan of whole configurations: numbers, problems, notes, JSON and text."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_training_toolkit.config.schema import Config
from llm_training_toolkit.errors import PlanError
from llm_training_toolkit.plan import DataFacts, Plan, StreamFacts, check_plan, format_plan, make_plan
from llm_training_toolkit.plan.lr_schedule import compute_scratch_lr
from llm_training_toolkit.plan.memory.memory_estimate import estimate_memory
from llm_training_toolkit.plan.plan import plan_workload

TINY = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}


def config(**sections: Any) -> Config:
    raw: dict[str, Any] = {
        "run": {"name": "test"},
        "model": {"name": "qwen3-0.6b", "config_overrides": TINY},
        "tokenizer": {"train": {"vocab_size": 1000}},
        "data": {"sequence_length": 128, "sources": [{"path": "x", "format": "code"}]},
        "train": {"steps": 100, "global_batch_size": 16, "micro_batch_size": 1},
        "cluster": {"workers": 2},
    }
    for name, section in sections.items():
        raw[name] = section if name in {"model", "tokenizer"} else {**raw.get(name, {}), **section}
    return Config.model_validate_json(json.dumps(raw), strict=True)


def where(plan: Plan) -> list[str]:
    return [problem.where for problem in plan.problems]


def test_a_sound_run() -> None:
    plan = check_plan(make_plan(config()))
    assert (plan.steps, plan.horizon.steps_estimated, plan.tokens_per_step) == (100, False, 16 * 128)
    assert (plan.split_batch(), plan.get_accumulation_steps()) == ((8, 8), 8)
    assert plan.split_batch(3) == (6, 5, 5)
    assert plan.lr == 3e-3
    assert plan.horizon.warmup_steps == 1
    assert plan.save_every_seconds == 600.0
    assert plan.save_every_steps is None
    schedule = plan.build_lr_schedule()
    assert schedule.compute_lr(0) == 3e-3
    assert schedule.compute_lr(99) == pytest.approx(3e-4)


@pytest.mark.parametrize(
    ("train", "facts", "steps", "estimated"),
    [
        ({"steps": None, "tokens": 16 * 128 * 10 + 1}, None, 11, False),
        ({"steps": None, "epochs": 2}, None, None, True),
        ({"steps": None, "epochs": 2}, (), None, True),
        ({"steps": None, "epochs": 2}, (100, 93), 13, False),
        ({"steps": None, "epochs": 2}, (100, 92, 500), 12, False),
        ({"steps": None, "epochs": 3}, (100, 92), 18, True),
        ({"steps": 7}, (100,), 7, False),
    ],
)
def test_the_length_of_a_run(
    train: dict[str, Any], facts: tuple[int, ...] | None, steps: int | None, *, estimated: bool
) -> None:
    plan = make_plan(config(train=train)).with_data(None if facts is None else DataFacts((StreamFacts(facts),)))
    assert (plan.steps, plan.horizon.steps_estimated) == (steps, estimated)
    assert ("steps" in plan.estimated) == estimated


def test_a_run_of_unknown_length_has_no_schedule_yet() -> None:
    plan = make_plan(config(train={"steps": None, "epochs": 1}))
    with pytest.raises(PlanError, match="ltt prepare"):
        plan.build_lr_schedule()
    assert plan.horizon.warmup_steps is None
    assert make_plan(config(train={"steps": None, "epochs": 1}, optim={"warmup": 5})).horizon.warmup_steps == 5


def test_passes_over_the_data() -> None:
    assert make_plan(config()).with_data(DataFacts((StreamFacts((400, 400)),))).horizon.epochs == pytest.approx(4.0)


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"run": {"dir": "gs://bucket/runs"}}, "run.dir"),
        ({"run": {"dir": "s3://bucket/runs"}, "model": {"name": "qwen3-0.6b", "lora": {}}}, "model.path"),
        (
            {
                "model": {"name": "qwen3-0.6b", "attn_implementation": "flash_attention_2"},
                "train": {"steps": 10, "global_batch_size": 8, "precision": "fp32"},
            },
            "model.attn_implementation",
        ),
        (
            {
                "model": {"name": "qwen3-0.6b", "attn_implementation": "varlen"},
                "train": {"steps": 10, "global_batch_size": 8, "precision": "fp32"},
                "cluster": {"gpus_per_worker": 1},
            },
            "model.attn_implementation",
        ),
        (
            {
                "model": {"name": "qwen3-0.6b", "attn_implementation": "flash_attention_3"},
                "cluster": {"gpus_per_worker": 0},
            },
            "model.attn_implementation",
        ),
        (
            {"model": {"name": "starcoderbase-1b", "attn_implementation": "flex_attention"}},
            "model.attn_implementation",
        ),
        ({"model": {"name": "qwen3-0.6b", "path": "Qwen/Qwen3-0.6B"}}, "tokenizer.train"),
        ({"cluster": {"workers": 17}}, "cluster.workers"),
        ({"optim": {"warmup": 101}}, "optim.warmup"),
        ({"optim": {"warmup": 90, "lr_scheduler": "wsd"}}, "optim.decay"),
        ({"model": {"name": "starcoderbase-1b"}, "data": {"sequence_length": 8193}}, "data.sequence_length"),
        (
            {
                "model": {"name": "qwen2-0.5b"},
                "data": {"sources": [{"path": "x", "format": "code", "fim": {"rate": 0.5}}]},
            },
            "data.sources[0].fim",
        ),
        ({"engine": {"deepspeed": {"train_batch_size": 8}}}, "engine.deepspeed.train_batch_size"),
    ],
)
def test_problems_are_found(sections: dict[str, Any], expected: str) -> None:
    plan = make_plan(config(**sections))
    assert where(plan) == [expected]
    with pytest.raises(PlanError, match=expected.replace("[", r"\[")):
        check_plan(plan)
    assert plan.problems[0].fix
    assert any(expected in line for line in format_plan(plan))


def test_an_empty_data_set_is_a_problem() -> None:
    assert where(make_plan(config(train={"steps": None, "epochs": 1})).with_data(DataFacts((StreamFacts((0,)),)))) == [
        "data.sources"
    ]


def test_all_problems_come_at_once() -> None:
    plan = make_plan(config(run={"dir": "gs://x"}, cluster={"workers": 40}, optim={"warmup": 1000}))
    assert where(plan) == ["run.dir", "cluster.workers", "optim.warmup"]
    with pytest.raises(PlanError) as caught:
        check_plan(plan)
    assert len(str(caught.value).splitlines()) == 3


def test_more_positions_from_scratch_are_possible() -> None:
    model = {"name": "starcoderbase-1b", "config_overrides": {"n_positions": 16384}}
    assert where(make_plan(config(model=model, data={"sequence_length": 16384}))) == []


@pytest.mark.parametrize(
    ("sections", "note"),
    [
        (
            {"engine": {"zero_stage": 1, "deepspeed": {"zero_optimization": {"overlap_comm": True}}}},
            "nothing at ZeRO 1",
        ),
        ({"cluster": {"workers": 1}, "engine": {"zero_stage": 2}}, "spreads nothing"),
        ({"cluster": {"workers": 3}}, "Shares differ"),
        ({"train": {"micro_batch_size": 9}}, "8 is enough"),
        ({"model": {"name": "starcoder2-3b"}, "data": {"sequence_length": 8192}}, "sliding window"),
    ],
)
def test_notes(sections: dict[str, Any], note: str) -> None:
    assert any(note in each for each in make_plan(config(**sections)).notes)


def test_the_ranks_that_were_started_count() -> None:
    assert make_plan(config(cluster={"workers": 0})).replicas == 1
    assert make_plan(config(cluster={"workers": 0}), ranks=4).split_batch() == (4, 4, 4, 4)


def test_json_has_the_contract() -> None:
    plan = make_plan(config(cluster={"workers": 12}, run={"dir": "gs://x"}))
    printed = json.loads(json.dumps(plan.to_json()))
    contract = {"parameters", "trainable_parameters", "steps", "global_batch", "accumulation", "tokens_per_step"}
    contract |= {"deepspeed", "problems", "memory_gb_per_device", "estimated", "notes"}
    assert contract <= set(printed)
    assert printed["accumulation"] == {
        "1": 16, "2": 8, "3": 6, "4": 4, "5": 4, "6": 3, "7": 3, "8": 2, "12": 2,
    }  # fmt: skip
    assert set(printed["problems"][0]) == {"code", "where", "what", "fix"}
    assert set(printed["memory_gb_per_device"]) == {"weights", "gradients", "optimizer", "activations", "logits"}


def test_too_many_workers_still_print() -> None:
    assert "17" not in make_plan(config(cluster={"workers": 17})).to_json()["accumulation"]


def test_text_says_the_arithmetic() -> None:
    text = format_plan(make_plan(config(engine={"zero_stage": 2})))
    assert 10 <= len(text) <= 14
    assert any("global batch 16 = 2 replicas x 8, in 8 micro-batches of 1" in line for line in text)
    assert any("100 steps x 2,048 tokens = 205k tokens" in line for line in text)
    assert any("ZeRO 2 spreads optimizer state and gradients over 2 workers" in line for line in text)
    assert len({line.index("  ") for line in text if line.startswith("learning rate")}) == 1


@pytest.mark.parametrize(
    ("parameters", "rate"), [(1000, 3e-3), (125_000_000, 6e-4), (1_300_000_000, 2e-4), (70_000_000_000, 1.2e-4)]
)
def test_rates_of_the_table(parameters: int, rate: float) -> None:
    assert compute_scratch_lr(parameters) == rate


@given(st.integers(1, 10**11), st.integers(1, 10**11))
def test_a_larger_model_never_gets_a_larger_rate(one: int, other: int) -> None:
    small, large = sorted((one, other))
    assert compute_scratch_lr(small) >= compute_scratch_lr(large)


def test_weights_get_the_rate_of_fine_tuning() -> None:
    tuned = config(model={"name": "qwen3-0.6b", "path": "x"}, tokenizer={"path": "x"})
    assert make_plan(tuned).lr == 1e-5
    assert make_plan(config(optim={"lr": 0.5})).lr == 0.5


ADAPTED = {"name": "qwen3-0.6b", "path": "x", "lora": {}}


def test_adapters_are_what_is_trained() -> None:
    plan = check_plan(make_plan(config(model=ADAPTED, tokenizer={"path": "x"})))
    assert plan.adapter is not None
    per_layer = 16 * (1024 + 2048 + 2 * (1024 + 1024) + 2048 + 1024 + 3 * (1024 + 3072))
    assert plan.trainable_parameters == 28 * per_layer
    assert plan.parameters == 596_049_920
    assert plan.lr == 1e-4
    assert plan.adapter.scaling == 2.0
    whole = make_plan(config(model={"name": "qwen3-0.6b", "path": "x"}, tokenizer={"path": "x"}))
    assert 0.66 < plan.flops_per_token / whole.flops_per_token < 0.8
    assert plan.deepspeed["zero_optimization"]["reduce_bucket_size"] == plan.trainable_parameters
    printed = json.loads(json.dumps(plan.to_json()))
    assert printed["adapter"]["targets"] == [
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    ]
    assert printed["trainable_parameters"] == plan.trainable_parameters
    assert make_plan(config()).to_json()["adapter"] is None
    [line] = [line for line in format_plan(plan) if line.startswith("adapters")]
    assert "LoRA rank 16, scaled by 2, on q_proj, k_proj" in line
    assert "10.1M parameters trained (10,092,544, 1.69% of the model)" in line


@pytest.mark.parametrize(
    ("lora", "sections", "expected", "said"),
    [
        (
            {"target_modules": ["q_prj"]},
            {},
            "model.lora.target_modules",
            "Did you mean q_proj? There are: q_proj, k_proj",
        ),
        ({"target_modules": ["query"]}, {}, "model.lora.target_modules", "There are: q_proj, k_proj"),
        ({"target_modules": ["lm_head"]}, {}, "model.lora.target_modules", "There are"),
        ({"modules_to_save": ["norm"]}, {}, "model.lora.modules_to_save", "There are: embed_tokens, lm_head"),
        ({"modules_to_save": ["lm_head"]}, {}, "model.lora.modules_to_save", "one matrix"),
        ({"quantize": "nf4"}, {"engine": {"zero_stage": 3}}, "engine.zero_stage", "blocks"),
        ({"quantize": "nf4"}, {"cluster": {"gpus_per_worker": 0}}, "model.lora.quantize", "need a GPU"),
    ],
)
def test_adapters_that_cannot_be(lora: dict[str, Any], sections: dict[str, Any], expected: str, said: str) -> None:
    plan = make_plan(config(model=ADAPTED | {"lora": lora}, tokenizer={"path": "x"}, **sections))
    assert where(plan) == [expected]
    assert said in str(plan.problems[0])


def test_adapters_that_are_no_mistake_but_worth_a_word() -> None:
    random = make_plan(config(model={"name": "qwen3-0.6b", "config_overrides": TINY, "lora": {}}))
    assert not random.problems
    assert any("random weights learn next to nothing" in note for note in random.notes)
    quantized = make_plan(config(model=ADAPTED | {"lora": {"quantize": "nf4"}}, tokenizer={"path": "x"}))
    assert not quantized.problems
    assert any("bitsandbytes" in note for note in quantized.notes)


def test_a_tokenizer_larger_than_the_embedding_is_a_problem() -> None:
    facts = DataFacts((StreamFacts((100,)),), vocab_size=200_000)
    assert [problem.where for problem in make_plan(config()).with_data(facts).problems] == ["tokenizer.path"]


def test_a_run_that_has_begun_counts_what_it_has_seen() -> None:
    train = {"train": {"steps": None, "epochs": 2, "global_batch_size": 8}}
    fresh = make_plan(config(**train)).with_data(DataFacts((StreamFacts((20, 20)),)))
    assert fresh.steps == 5
    lengthened = make_plan(config(**train)).with_data(
        DataFacts((StreamFacts((20, 20)),), steps_done=3, sequences_done=20)
    )
    assert lengthened.steps == 6


def test_a_mixture_shows_what_each_source_is_worth() -> None:
    sources = [{"path": "a", "format": "code", "weight": 3.0}, {"path": "b", "format": "code", "weight": 1.0}]
    mixed = config(data={"sources": sources}, train={"steps": 100, "global_batch_size": 8})
    before = make_plan(mixed)
    assert [(source.path, source.share, source.epochs) for source in before.horizon.mixture] == [
        ("a", 0.75, None),
        ("b", 0.25, None),
    ]
    plan = make_plan(mixed).with_data(DataFacts((StreamFacts((300,), share=3), StreamFacts((100, 100), share=1))))
    assert [source.epochs for source in plan.horizon.mixture] == [pytest.approx(2.0), pytest.approx(2.0)]
    assert plan.horizon.epochs is None
    assert any(line.startswith("source") and "a: 75.0% of the tokens, 2 epochs" in line for line in format_plan(plan))
    assert plan.to_json()["mixture"][1] == {"path": "b", "share": 0.25, "epochs": pytest.approx(2.0)}


def test_an_elastic_run_is_planned_at_every_size() -> None:
    plan = make_plan(
        config(
            cluster={"workers": [1, 6]},
            train={"micro_batch_size": 2, "global_batch_size": 12},
            engine={"zero_stage": 3},
        )
    )
    assert (plan.replicas, plan.workers, plan.fewest_workers, plan.is_elastic) == (6, 6, 1, True)
    assert plan.to_json()["accumulation"] == {"1": 6, "2": 3, "3": 2, "4": 2, "5": 2, "6": 1, "7": 1, "8": 1}
    text = format_plan(plan)
    for row in (
        "with 1 worker: 12 each, in 6 micro-batches of 2",
        "with 2 workers: 6 each, in 3 micro-batches of 2",
        "with 3 to 5 workers: 2 to 4 each, in 2 micro-batches of 2",
        "with 6 workers: 2 each, in 1 micro-batch of 2",
    ):
        assert any(line.endswith(row) for line in text), row
    assert any("over 1 to 6 workers" in line for line in text)
    alone = make_plan(
        config(cluster={"workers": 1}, train={"micro_batch_size": 2, "global_batch_size": 12}, engine={"zero_stage": 3})
    )
    assert plan.memory_gb_per_device == alone.memory_gb_per_device, "a device holds the most with the fewest workers"
    at_two = make_plan(config(cluster={"workers": [1, 6]}, engine={"zero_stage": 3}), ranks=2)
    assert at_two.memory_gb_per_device != plan.memory_gb_per_device


@pytest.mark.parametrize(("workers", "size"), [([4, 6], 4), ([2, 8], 8)])
def test_memory_of_an_elastic_run_has_the_second_partition_of_the_fewest_workers(workers: list[int], size: int) -> None:
    elastic = config(cluster={"workers": workers}, engine={"zero_stage": 3, "zero_hpz_partition_size": size})
    plan = make_plan(elastic)
    there = plan_workload(elastic, min(workers))
    assert plan.memory_gb_per_device == estimate_memory(there).to_gigabytes()
    assert there.second_partition == (size if min(workers) % size == 0 else 1)
    assert ("zero_hpz_partition_size" in plan.deepspeed["zero_optimization"]) == (max(workers) % size == 0)


def test_notes_of_an_elastic_run_are_of_the_size_they_are_true_of() -> None:
    notes = make_plan(config(cluster={"workers": [1, 3]}, train={"micro_batch_size": 12})).notes
    assert not any("is enough" in note or "Shares differ" in note or "spreads nothing" in note for note in notes)
    assert where(make_plan(config(cluster={"workers": [2, 17]}))) == ["cluster.workers"]


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 8))
def test_the_lines_of_an_elastic_run_name_every_size_once(fewest: int, more: int, micro_batch: int) -> None:
    sizes = range(fewest, min(fewest + more, 64) + 1)
    train = {"global_batch_size": 64, "micro_batch_size": micro_batch}
    text = format_plan(make_plan(config(cluster={"workers": [fewest, fewest + more]}, train=train)))
    rows = [line.split("with ")[1].split(" worker")[0] for line in text if line.startswith(" ") and "with " in line]
    named = [range(int(row.split(" to ")[0]), int(row.split(" to ")[-1]) + 1) for row in rows]
    assert [size for group in named for size in group] == list(sizes)
