"""Strict loading: what is accepted, and that every problem is named where it stands."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_training_toolkit.config import (
    Config,
    dump_config_json,
    load_config,
    parse_config,
    parse_config_json,
    renamed_keys,
)
from llm_training_toolkit.config.fields import format_type, get_inner_section, iter_sections, resolve_key
from llm_training_toolkit.config.load import format_unknown_key
from llm_training_toolkit.config.search import SearchConfig
from llm_training_toolkit.config.source_config import SourceConfig, SourceFormat
from llm_training_toolkit.errors import ConfigError

SMALL = """\
run: {name: small}
model: {name: qwen3-0.6b}
tokenizer: {train: {vocab_size: 512}}
data:
  sequence_length: 64
  sources:
    - {path: "python:stdlib", format: code}
train: {steps: 10}
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "a.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def problems(folder: Path, text: str, *overrides: str) -> list[str]:
    """The lines of the error, without the folder."""
    with pytest.raises(ConfigError) as caught:
        load_config(written(folder, text), overrides)
    return str(caught.value).replace(f"{folder}/", "").splitlines()


def small(**changed: Any) -> dict[str, Any]:
    data: dict[str, Any] = {
        "run": {"name": "small"},
        "model": {"name": "qwen3-0.6b"},
        "tokenizer": {"train": {"vocab_size": 512}},
        "data": {"sequence_length": 64, "sources": [{"path": "python:stdlib", "format": "code", "fim": {}}]},
        "train": {"steps": 10},
    }
    return data | changed


def test_defaults_fill_a_short_file(tmp_path: Path) -> None:
    config = load_config(written(tmp_path, SMALL))
    assert config.optim.lr == "auto"
    assert config.data.sources[0].path == "python:stdlib"
    assert config.train.steps == 10


@pytest.mark.parametrize(
    ("text", "value"), [("3e-4", 3e-4), ("1e-4", 1e-4), ("1E-3", 1e-3), ("2", 2.0), ("auto", "auto")]
)
def test_numbers_are_yaml_1_2(tmp_path: Path, text: str, value: float | str) -> None:
    lr = load_config(written(tmp_path, f"{SMALL}optim: {{lr: {text}}}")).optim.lr
    assert lr == value
    assert type(lr) is type(value)


def test_a_float_may_count_tokens(tmp_path: Path) -> None:
    assert load_config(written(tmp_path, SMALL), ["train={tokens: 2e9}"]).train.tokens == 2_000_000_000


@pytest.mark.parametrize("name", ["2024-01-01", "no", "yes", "12-30"])
def test_text_that_other_yaml_takes_for_something_else(tmp_path: Path, name: str) -> None:
    assert load_config(written(tmp_path, SMALL.replace("small", name))).run.name == name


def test_no_is_not_false(tmp_path: Path) -> None:
    assert problems(tmp_path, SMALL + "export: {at_end: no}") == [
        'a.yaml:9: export.at_end = "no": expected true or false'
    ]


def test_every_renamed_key_names_its_successor() -> None:
    for section, names in renamed_keys._SECTIONS.items():
        for old, new in names.items():
            path = (*(part for part in section.split(".") if part), old)
            root = SearchConfig if section in {"", "scheduler", "searcher"} else Config
            numbered = tuple(each for part in path for each in ((part, 0) if part in {"sources", "tasks"} else (part,)))
            _, holder, _ = resolve_key(numbered[:-1], root)
            inner = get_inner_section(holder)
            assert inner is not None
            assert new in inner.model_fields
            assert old not in inner.model_fields
            assert format_unknown_key(numbered, root).endswith(f"{new} now")


def test_a_renamed_key_is_refused_with_the_new_one(tmp_path: Path) -> None:
    (line,) = problems(tmp_path, SMALL + "optim:\n  clip: 0.5")
    assert line == "a.yaml:10: optim.clip = 0.5: unknown key; it is optim.max_grad_norm now"


def test_unknown_key_names_line_value_likely_spelling_and_valid_keys(tmp_path: Path) -> None:
    (line,) = problems(tmp_path, SMALL + "optim:\n  name: adamw\n  lrr: 0.1")
    assert line.startswith("a.yaml:11: optim.lrr = 0.1: unknown key; did you mean optim.lr? (valid in optim: name, lr,")


def test_key_in_the_wrong_section_is_sent_to_the_right_one(tmp_path: Path) -> None:
    (line,) = problems(tmp_path, SMALL + "global_batch_size: 8")
    assert "did you mean train.global_batch_size?" in line


@pytest.mark.parametrize("key", [key for key, _ in iter_sections()])
def test_every_section_refuses_an_unknown_key(key: str) -> None:
    data = small()
    target: Any = data
    parts = key.replace("N", "0").split(".") if key else []
    for part, following in zip(parts, [*parts, ""][1:], strict=True):
        target = target[int(part)] if part == "0" else target.setdefault(part, [{}] if following == "0" else {})
    target["zzz"] = 1
    with pytest.raises(ConfigError, match=r"zzz = 1: unknown key") as caught:
        parse_config(data, "test")
    assert f"test: {key.replace('N', '0')}{'.' if key else ''}zzz" in str(caught.value)


QUOTED = [
    ("run", "seed", "a whole number of at least 0"),
    ("optim", "lr", "a number above 0 or auto"),
    ("optim", "warmup", "a number from 0 to 1 or a whole number of at least 0"),
    ("optim", "max_grad_norm", "a number of at least 0"),
    ("train", "tokens", "a whole number from 1 to 1000000000000000 or null"),
    ("engine", "zero_stage", "one of auto, 0, 1, 2, 3"),
]


@pytest.mark.parametrize(("section", "key", "expected"), QUOTED)
def test_a_number_in_quotes_is_refused_once(section: str, key: str, expected: str) -> None:
    data = small()
    data[section] = {**data.get(section, {}), key: "1"}
    with pytest.raises(ConfigError) as caught:
        parse_config(data, "test")
    assert str(caught.value) == f'test: {section}.{key} = "1": expected {expected}; remove the quotes'


@pytest.mark.parametrize(("old", "now"), [(True, "full"), (False, "none")])
def test_checkpointing_of_earlier_versions_names_the_value_of_today(old: bool, now: str) -> None:
    data = small()
    data["model"] = {**data["model"], "activation_checkpointing": old}
    with pytest.raises(ConfigError, match=f"model.activation_checkpointing = {str(old).lower()}: .*write {now} for"):
        parse_config(data, "test")


def test_true_in_quotes_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected true or false; remove the quotes"):
        parse_config(small(export={"at_end": "true"}), "test")


def test_a_number_for_text_asks_for_quotes(tmp_path: Path) -> None:
    assert problems(tmp_path, SMALL + "cluster:\n  env:\n    NCCL_DEBUG: 1") == [
        "a.yaml:11: cluster.env.NCCL_DEBUG = 1: expected text; put it in quotes"
    ]


def test_every_duplicate_key_is_named_with_both_places(tmp_path: Path) -> None:
    lines = problems(tmp_path, SMALL + "optim:\n  lr: 1e-3\n  lr: 2e-3\nrun: {seed: 3}")
    assert len(lines) == 2
    assert lines[0].startswith("a.yaml:11: optim.lr: duplicate key (first at ")
    assert lines[0].endswith("a.yaml:10); keep one")
    assert lines[1].startswith("a.yaml:12: run: duplicate key")


def test_all_problems_are_reported_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = SMALL.replace(
        "train: {steps: 10}", "train: {steps: 10, epochs: 1}\noptim:\n  lr: '0.1'\n  lr: .inf\n  eps: 0"
    )
    lines = problems(tmp_path, text + "\nengine: {zero_stage: 5}\n", "nonsense", "optim.weight_deca=0")
    assert [line.split(": ")[0] for line in lines] == [
        "a.yaml:8",
        "a.yaml:11",
        "a.yaml:11",
        "a.yaml:12",
        "a.yaml:14",
        "override nonsense",
        "override optim.weight_deca=0",
    ]
    assert lines[0] == "a.yaml:8: train: give exactly one of train.tokens, train.steps and train.epochs"
    assert lines[2] == "a.yaml:11: optim.lr = inf: expected a finite number"
    assert lines[3] == "a.yaml:12: optim.eps = 0: expected a number above 0"


def test_missing_keys_and_sections_are_named(tmp_path: Path) -> None:
    lines = problems(tmp_path, "run:\n  seed: 1\nmodel: {name: q}\ntokenizer: {path: t}\ntrain: {steps: 1}\n")
    assert lines[0].startswith("a.yaml: data: missing; expected a section (sequence_length, sources,")
    assert lines[1].startswith("a.yaml:1: run.name: missing; expected text that matches")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "a.yaml: run: missing"),
        ("[1]", "a.yaml: expected sections (run,"),
        ("run: [1,\nmodel: 2", "a.yaml:2: not valid YAML: expected ',' or ']'"),
        ("run: 1\n model: 2", "a.yaml:2: not valid YAML: mapping values are not allowed here"),
        ("a: 1\n---\na: 2", "a.yaml:2: not valid YAML"),
        ("a: \x01", "a.yaml: not valid YAML"),
        ("run: &x {name: *x}", "a.yaml:1: run.name: refers to itself"),
        ("run: !!int many", "a.yaml:1: run: 'many' does not fit its YAML tag"),
        ("run: !python {}", "a.yaml:1: run: unknown YAML tag !python; remove it"),
        ("run: {[1]: 2}", "a.yaml:1: run: a key must be a name"),
        ('run: {name: "\\ud800"}', "a.yaml: cannot be written as JSON"),
    ],
)
def test_unusable_yaml(tmp_path: Path, text: str, expected: str) -> None:
    assert any(line.startswith(expected) for line in problems(tmp_path, text))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"run: \xff")
    with pytest.raises(ConfigError, match=r"none\.yaml: no such file"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_config(tmp_path)
    with pytest.raises(ConfigError, match=r"is not UTF-8 text \(byte 5\)"):
        load_config(tmp_path / "latin.yaml")


def test_errors_inside_a_list_do_not_call_the_list_short(tmp_path: Path) -> None:
    assert problems(tmp_path, SMALL, "data.sources.0.format=cod") == [
        f"override data.sources.0.format=cod: expected one of {', '.join(get_args(SourceFormat))}"
    ]
    assert problems(tmp_path, SMALL, "data.sources=[]") == [
        "override data.sources=[]: expected a list of at least 1, each a section "
        f"({', '.join(SourceConfig.model_fields)})"
    ]


def test_overrides_reach_sections_lists_and_null(tmp_path: Path) -> None:
    overrides = [
        "data.sources.0.fim.rate=0.3",
        "optim.betas=[0.8, 0.9]",
        "model.config_overrides={num_hidden_layers: 2}",
        "train.steps=null",
        "train.epochs=3",
        "run.name='7'",
        "data.sources.0.path=a=b",
    ]
    config = load_config(written(tmp_path, SMALL), overrides)
    assert config.data.sources[0].fim is not None
    assert config.data.sources[0].fim.rate == 0.3
    assert config.data.sources[0].path == "a=b"
    assert config.optim.betas == (0.8, 0.9)
    assert config.model.config_overrides == {"num_hidden_layers": 2}
    assert (config.train.steps, config.train.epochs) == (None, 3)
    assert config.run.name == "7"


def test_adapters_are_asked_for_by_any_of_their_fields(tmp_path: Path) -> None:
    assert load_config(written(tmp_path, SMALL)).model.lora is None
    asked = load_config(
        written(tmp_path, SMALL), ["model.lora.rank=8", "model.lora.target_modules=[q_proj, v_proj]"]
    ).model.lora
    assert asked is not None
    assert (asked.rank, asked.alpha, asked.target_modules) == (8, 32, ("q_proj", "v_proj"))
    plain = load_config(written(tmp_path, SMALL), ["model.lora={}"]).model.lora
    assert plain is not None
    assert (plain.rank, plain.target_modules, plain.quantize) == (16, "auto", None)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.lora.rank=0", "expected a whole number of at least 1"),
        ("model.lora.target_modules=q_proj", "expected auto or a list of at least 1, each text"),
        ("model.lora.target_modules=[]", "expected auto or a list of at least 1, each text"),
        ("model.lora.dropout=1", "expected a number from 0 to below 1"),
        ("model.lora.quantize=int8", "expected nf4 or null"),
        ("model.lora.r=4", "unknown key"),
    ],
)
def test_adapters_that_are_written_wrong(tmp_path: Path, override: str, said: str) -> None:
    (line,) = problems(tmp_path, SMALL, override)
    assert said in line


def test_the_last_override_of_a_key_counts(tmp_path: Path) -> None:
    assert load_config(written(tmp_path, SMALL), ["run.seed=x", "run.seed=1", "run.seed=2"]).run.seed == 2


def test_an_override_can_repair_the_file(tmp_path: Path) -> None:
    assert load_config(written(tmp_path, SMALL + "optim: {lr: '1'}"), ["optim.lr=1"]).optim.lr == 1.0


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.lr", "write key=value, for example train.steps=100"),
        ("=3", "write key=value, for example train.steps=100"),
        ("optim..lr=3", "write key=value, for example train.steps=100"),
        ("optim.lrr=0.1", "unknown key; did you mean optim.lr?"),
        ("optm.lr=0.1", "optm: unknown key; did you mean optim?"),
        ("optim.lr='0.1'", "expected a number above 0 or auto; remove the quotes"),
        ("optim.lr=null", "expected a number above 0 or auto"),
        ("optim=null", "expected a section (name, lr,"),
        ("run.name=7", "expected text that matches `^[A-Za-z0-9][A-Za-z0-9._-]*$`; put it in quotes"),
        ("run.seed=", "no value after the =; write null for none"),
        ("run.dir=@x", "the value is not valid YAML: found character '@'"),
        ("run.dir=a: b", "write a list as [a, b] and a section as {key: value}"),
        ("run.name.x=3", "run.name is a value, not a section: it has no x"),
        ("data.sources.1.format=text", "data.sources has no entry 1: its 1 entries count from 0"),
        ("data.sources.x=1", "data.sources has no entry x"),
        ("eval={interval: 1, interval: 2}", "eval.interval: duplicate key; keep one"),
    ],
)
def test_bad_overrides_are_named(tmp_path: Path, override: str, expected: str) -> None:
    (line,) = problems(tmp_path, SMALL, override)
    assert line.startswith(f"override {override}: {expected}")


def test_parse_takes_tuples_and_refuses_objects() -> None:
    assert parse_config(small(optim={"betas": (0.5, 0.5)}), "test").optim.betas == (0.5, 0.5)
    with pytest.raises(
        ConfigError, match=r"run = <object .*>: expected text, a number, true, false or null, not object"
    ):
        parse_config(small(run=object()), "test")


def test_parse_leaves_the_data_as_it_was() -> None:
    data = small()
    before = copy.deepcopy(data)
    parse_config(data, "test")
    assert data == before


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "resolved.json:1: not valid JSON"),
        ("[]", "resolved.json: expected sections"),
        ('{"run": {"name": "a", "name": "b"}}', "resolved.json: duplicate key name; keep one"),
        ('{"optim": {"lr": NaN}}', "resolved.json: optim.lr = nan: expected a finite number"),
    ],
)
def test_from_json_is_as_strict(text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config_json(text)
    assert any(line.startswith(expected) for line in str(caught.value).splitlines())


def test_errors_survive_pickling(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(written(tmp_path, "run: 1"))
    again = pickle.loads(pickle.dumps(caught.value))
    assert type(again) is ConfigError
    assert str(again) == str(caught.value)


def test_every_field_has_a_type_in_plain_words() -> None:
    for key, section in iter_sections():
        for name, info in section.model_fields.items():
            words = format_type(info.annotation, info.metadata)
            assert "a value" not in words, f"{key}.{name}"


def test_config_is_light() -> None:
    heavy = "{'torch', 'ray', 'deepspeed', 'transformers'} & set(sys.modules)"
    code = f"import sys, llm_training_toolkit.config; assert not {heavy}"
    subprocess.run([sys.executable, "-c", code], check=True)


shares = st.floats(0, 1)
positive = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
counts = st.integers(1, 10**12)
texts = st.text(min_size=1)
paths = texts.filter(lambda text: not text.startswith("~"))  # the home of a user that does not exist is refused
numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.booleans()
leaves = numbers | st.text()
keys = st.text(max_size=80)  # YAML's keys end at 1,024 characters, of which JSON may take twelve for one
fims = st.fixed_dictionaries(
    {}, optional={"rate": shares, "spm_rate": shares, "loss": st.sampled_from(["all", "middle"])}
)
sources = st.fixed_dictionaries(
    {"path": paths, "format": st.sampled_from(["code", "text"])}, optional={"fim": fims | st.none()}
)
configs = st.fixed_dictionaries(
    {
        "run": st.fixed_dictionaries({"name": st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]*", fullmatch=True)}),
        "model": st.fixed_dictionaries({"name": texts}, optional={"config_overrides": st.dictionaries(keys, numbers)}),
        "tokenizer": st.fixed_dictionaries({"path": paths})
        | st.fixed_dictionaries({"train": st.fixed_dictionaries({"vocab_size": st.integers(512, 10**6)})}),
        "data": st.fixed_dictionaries(
            {"sequence_length": st.integers(16, 10**9), "sources": st.lists(sources, min_size=1, max_size=3)}
        ),
        "train": st.sampled_from(["tokens", "steps", "epochs"]).flatmap(
            lambda length: st.fixed_dictionaries({length: counts})
        ),
    },
    optional={
        "optim": st.fixed_dictionaries(
            {},
            optional={
                "lr": positive | st.just("auto"),
                "warmup": shares | counts,
                "eps": positive,
                "max_grad_norm": shares,
            },
        ),
        "engine": st.fixed_dictionaries({"deepspeed": st.dictionaries(keys, leaves | st.lists(leaves))}),
        "checkpoint": st.fixed_dictionaries({"interval": counts | st.sampled_from(["90s", "10m", "1.5h"])}),
        "cluster": st.fixed_dictionaries(
            {
                "gpus_per_worker": st.sampled_from(["auto", 0, 1]),
                "env": st.dictionaries(keys, st.text()),
                "workers": st.integers(0, 9) | st.tuples(st.integers(1, 4), st.integers(4, 9)),
            }
        ),
    },
).map(lambda data: parse_config(data, "generated"))


@given(configs)
def test_json_round_trip(config: Config) -> None:
    again = parse_config_json(dump_config_json(config))
    assert again == config
    assert dump_config_json(again) == dump_config_json(config)
    assert type(again.optim.warmup) is type(config.optim.warmup)


@settings(max_examples=30)
@given(configs)
def test_a_json_file_is_a_yaml_file(config: Config) -> None:
    """Every resolved value keeps its meaning when a person pastes it into an override."""
    overrides = [f"{key}={json.dumps(value)}" for key, value in json.loads(dump_config_json(config)).items()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "read_text", lambda *_, **__: "{}")
        assert load_config(Path("empty.yaml"), overrides) == config


@pytest.mark.parametrize(("workers", "ends"), [(0, (0, 0)), (4, (4, 4)), ([1, 8], (1, 8)), ([3, 3], (3, 3))])
def test_workers_are_a_number_or_the_fewest_and_the_most(workers: object, ends: tuple[int, int]) -> None:
    cluster = parse_config(small(cluster={"workers": workers}), "test").cluster
    assert (cluster.min_workers, cluster.max_workers) == ends


@pytest.mark.parametrize("workers", [-1, True, 1.0, "2", None, [], [1], [0, 3], [3, 1], [1, 2, 3], [1, 2.0], [1, True]])
def test_other_workers_are_refused_in_words(workers: object) -> None:
    with pytest.raises(ConfigError, match=r"cluster.workers.*the fewest \(at least 1\) and the most of them"):
        parse_config(small(cluster={"workers": workers}), "test")


@pytest.mark.parametrize("duration", ["0s", 5, "soon", None])
def test_a_duration_is_written_with_its_unit(duration: object) -> None:
    with pytest.raises(ConfigError, match=r"failures.hang_timeout.*write a duration above zero \(90s, 10m, 1.5h\)"):
        parse_config(small(failures={"hang_timeout": duration}), "test")
