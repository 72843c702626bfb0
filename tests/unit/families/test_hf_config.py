"""Finding sizes, changing shapes, and refusing what cannot be built."""

import json
from pathlib import Path
from typing import Any

import pytest

from llm_training_toolkit import families
from llm_training_toolkit.config import parse_config
from llm_training_toolkit.config.schema import Config
from llm_training_toolkit.errors import PlanError


def config(
    name: str, shape: dict[str, Any] | None = None, *, train: int | None = None, length: int = 64, **model: Any
) -> Config:
    raw = {
        "run": {"name": "test"},
        "model": {"name": name, "config_overrides": shape or {}, **model},
        "tokenizer": {"path": "tokenizer"} if train is None else {"train": {"vocab_size": train}},
        "data": {"sequence_length": length, "sources": [{"path": "x", "format": "text"}]},
        "train": {"steps": 10},
    }
    return Config.model_validate_json(json.dumps(raw), strict=True)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("qwen3-06b", "qwen3-0.6b"),
        ("Qwen/Qwen3-8", "qwen3-8b"),
        ("starcoder2-3", "starcoder2-3b"),
        ("Qwen3 4B", "qwen3-4b"),
        ("Qwen/Qwen3.5-8B", "qwen3.5-9b"),
        ("Qwen/Qwen3.5-32B-Instruct", "qwen3.5-2b"),
        ("qwen3_5-4b", "qwen3.5-4b"),
        ("Qwen/CodeQwen-7B", "codeqwen1.5-7b"),
        ("Qwen1.5-13B-Chat", "qwen1.5-14b"),
        ("Qwen/Qwen3-Coder-Next-80B", "qwen3-coder-next"),
        ("Qwen/Qwen-7B", "qwen2-7b"),
    ],
)
def test_an_unknown_size_names_the_nearest(wrong: str, right: str) -> None:
    with pytest.raises(PlanError, match=f"Did you mean .*{right}"):
        families.find_size(wrong)


TYPED = {
    "qwen3-0.6b": "Qwen/Qwen3-0.6B Qwen3-0.6B QWEN3-0.6B Qwen/Qwen3-0.6B-Base qwen3-0.6b/",
    "qwen3-4b": "Qwen/Qwen3-4B Qwen/Qwen3-4B-Base",
    "qwen3-8b": "Qwen/Qwen3-8B Qwen/Qwen3-8B-Base",
    "qwen3-32b": "Qwen/Qwen3-32B",
    "qwen3-14b": "Qwen/Qwen3-14B qwen/QWEN3-14B-base",
    "qwen3-next-80b-a3b-instruct": "Qwen/Qwen3-Coder-Next Qwen3-Coder-Next-Base Qwen/Qwen3-Next-80B-A3B-Thinking",
    "qwen3-coder-30b-a3b-instruct": "Qwen/Qwen3-Coder-30B-A3B-Instruct",
    "qwen3.5-0.8b": "Qwen/Qwen3.5-0.8B Qwen3.5-0.8B-Base QWEN/qwen3.5-0.8b",
    "qwen3.5-2b": "Qwen/Qwen3.5-2B Qwen/Qwen3.5-2B-Base",
    "qwen3.5-4b": "Qwen/Qwen3.5-4B weights/Qwen3.5-4B/",
    "qwen3.5-9b": "Qwen/Qwen3.5-9B Qwen/Qwen3.5-9B-Base",
    "qwen3.5-27b": "Qwen/Qwen3.5-27B Qwen/Qwen3.6-27B Qwen/Qwen3.8-27B",
    "qwen3.5-35b-a3b": "Qwen/Qwen3.5-35B-A3B Qwen3.5-35B-A3B-Base Qwen/Qwen3.6-35B-A3B",
    "qwen3.5-122b-a10b": "Qwen/Qwen3.5-122B-A10B",
    "qwen3.5-397b-a17b": "Qwen/Qwen3.5-397B-A17B",
    "qwen1.5-7b": "Qwen/Qwen1.5-7B Qwen/Qwen1.5-7B-Chat",
    "qwen1.5-moe-a2.7b": "Qwen/Qwen1.5-MoE-A2.7B Qwen1.5-MoE-A2.7B-Chat",
    "qwen2-57b-a14b": "Qwen/Qwen2-57B-A14B Qwen/Qwen2-57B-A14B-Instruct",
    "codeqwen1.5-7b": "Qwen/CodeQwen1.5-7B CodeQwen1.5-7B-Chat",
    "qwen3-30b-a3b": "Qwen/Qwen3-30B-A3B Qwen/Qwen3-30B-A3B-Base",
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B Qwen/Qwen2.5-0.5B-Instruct",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B Qwen2.5-7B-Instruct weights/Qwen2.5-7B",
    "qwen2.5-coder-7b": "Qwen/Qwen2.5-Coder-7B Qwen/Qwen2.5-Coder-7B-Instruct Qwen2.5-Coder-7B-Instruct",
    "qwen2.5-coder-32b": "Qwen/Qwen2.5-Coder-32B-Instruct",
    "qwen2-7b": "Qwen/Qwen2-7B Qwen/Qwen2-7B-Instruct",
    "starcoder2-3b": "bigcode/starcoder2-3b StarCoder2-3B",
    "starcoder2-7b": "bigcode/starcoder2-7b",
    "starcoder2-15b": "bigcode/starcoder2-15b bigcode/starcoder2-15b-instruct-v0.1",
    "starcoderbase-1b": "bigcode/starcoderbase-1b",
    "starcoder": "bigcode/starcoder bigcode/starcoderbase bigcode/starcoderplus",
}


@pytest.mark.parametrize(("size", "typed"), TYPED.items())
def test_names_as_people_type_them(size: str, typed: str) -> None:
    assert {families.find_size(name).name for name in typed.split()} == {size}


def test_path_alone_names_model_and_tokenizer() -> None:
    raw = {
        "run": {"name": "test"},
        "model": {"path": "Qwen/Qwen2.5-Coder-7B-Instruct"},
        "data": {"sequence_length": 64, "sources": [{"path": "x", "format": "text"}]},
        "train": {"steps": 10},
    }
    given = parse_config(raw, "test")
    assert families.find_size(given.model.name).name == "qwen2.5-coder-7b"
    assert given.tokenizer.path == "Qwen/Qwen2.5-Coder-7B-Instruct"
    with pytest.raises(PlanError, match="no known size"):
        families.resolve_hf_config(parse_config(raw | {"model": {"path": "weights/mine"}}, "test"))


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("qwen2.5-coder-7b-instruct", "qwen2.5-coder-7b"),
        ("qwen3-0.6b-base", "qwen3-0.6b"),
        ("starcoderplus", "starcoder"),
        ("starcoder-15.5b", "starcoder"),
        ("qwen3-235b-a22b-thinking-2507", "qwen3-235b-a22b-instruct-2507"),
    ],
)
def test_weights_of_the_same_shape_are_known_by_their_own_names(name: str, size: str) -> None:
    assert families.find_size(name).name == size


def test_every_name_is_one_of_the_hub_in_lower_case() -> None:
    names = [name for size in families.SIZES.values() for name in (size.name, *size.other_names)]
    assert len(set(names)) == len(names)
    assert all(name == name.lower() and "/" not in name for name in names)


def test_a_far_name_lists_what_is_known() -> None:
    with pytest.raises(PlanError, match=r"Known: qwen2-0\.5b"):
        families.find_size("zzzzzz")


def test_head_dim_of_qwen3_stays() -> None:
    hf = families.resolve_hf_config(
        config("qwen3-0.6b", {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1})
    )
    assert (hf["head_dim"], hf["hidden_size"]) == (128, 64)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("qwen3-0.6b", {"layers": 2}, "layers is not a key .*num_hidden_layers"),
        ("qwen2.5-0.5b", {"head_dim": 64}, "head_dim is not a key"),
        ("starcoder2-3b", {"attention_dropout": 0.1}, "attention_dropout is not a key"),
        ("qwen3-0.6b", {"num_key_value_heads": 3}, "16 attention heads are not divisible by 3"),
        ("qwen2.5-0.5b", {"hidden_size": 100}, "100 is not divisible by 14"),
        ("starcoderbase-1b", {"n_embd": 100}, "100 is not divisible by 16"),
        ("qwen3-0.6b", {"head_dim": 33}, "head_dim 33 is odd"),
        ("starcoder2-3b", {"hidden_size": 24 * 3}, "head_dim 3 is odd"),
        ("qwen3-30b-a3b", {"intermediate_size": 64}, "intermediate_size is not a key .*moe_intermediate_size"),
        ("qwen3-30b-a3b", {"num_experts": 4}, "a token cannot pass 8 of 4 experts"),
        ("qwen3-0.6b", {"hidden_size": 1.5}, "must be a whole number"),
        ("qwen3-0.6b", {"hidden_size": True}, "must be a whole number"),
        ("qwen3-0.6b", {"num_hidden_layers": 0}, "must be above zero"),
        ("qwen3-0.6b", {"tie_word_embeddings": 1}, "true or false"),
        ("starcoderbase-1b", {"n_layer": 2, "num_hidden_layers": 3}, "both set n_layer"),
    ],
)
def test_an_impossible_shape_is_refused(name: str, shape: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        families.resolve_hf_config(config(name, shape))


def test_all_wrong_keys_are_named_at_once() -> None:
    with pytest.raises(PlanError) as caught:
        families.resolve_hf_config(config("qwen3-0.6b", {"layers": 2, "width": 3}))
    assert "layers" in str(caught.value)
    assert "width" in str(caught.value)


def test_common_names_reach_starcoder_1() -> None:
    hf = families.resolve_hf_config(config("starcoderbase-1b", {"hidden_size": 64, "num_hidden_layers": 2}))
    assert (hf["n_embd"], hf["n_layer"]) == (64, 2)
    assert "hidden_size" not in hf


def test_the_vocabulary_follows_shape_then_tokenizer_then_size() -> None:
    assert families.resolve_hf_config(config("qwen3-0.6b"))["vocab_size"] == 151936
    assert families.resolve_hf_config(config("qwen3-0.6b", train=1000))["vocab_size"] == 1024
    assert families.resolve_hf_config(config("qwen3-0.6b", {"vocab_size": 1001}, train=1000))["vocab_size"] == 1001
    with pytest.raises(PlanError, match="vocab_size 900 is below"):
        families.resolve_hf_config(config("qwen3-0.6b", {"vocab_size": 900}, train=1000))


def test_positions_grow_with_the_sequence_unless_learned() -> None:
    assert families.resolve_hf_config(config("qwen3-0.6b", length=100_000))["max_position_embeddings"] == 100_000
    assert families.resolve_hf_config(config("qwen3-0.6b", length=100))["max_position_embeddings"] == 40960
    assert families.resolve_hf_config(config("starcoder", length=100_000))["n_positions"] == 8192


def test_weights_keep_the_shape_of_the_size() -> None:
    assert families.resolve_hf_config(config("qwen3-0.6b", path="Qwen/Qwen3-0.6B"))["hidden_size"] == 1024


def test_weights_of_another_family_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    with pytest.raises(PlanError, match=r"holds a qwen3 model, and model\.name = qwen2\.5-0\.5b is of qwen2"):
        families.resolve_hf_config(config("qwen2.5-0.5b", path=str(tmp_path)))


def test_the_vocabulary_grows_by_multiples_of_64_and_never_shrinks(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2", "vocab_size": 512}))
    assert (
        families.resolve_hf_config(config("qwen2.5-0.5b", path=str(tmp_path), resize_vocab_to=576))["vocab_size"] == 576
    )
    assert families.resolve_hf_config(config("starcoderbase", path="a/b", resize_vocab_to=49216))["vocab_size"] == 49216
    for rows in (448, 512):
        with pytest.raises(
            PlanError, match=rf"resize_vocab_to = {rows}: the weights have 512 rows, and none is removed"
        ):
            families.resolve_hf_config(config("qwen2.5-0.5b", path=str(tmp_path), resize_vocab_to=rows))
    with pytest.raises(ValueError, match="multiple of 64"):
        config("qwen2.5-0.5b", path=str(tmp_path), resize_vocab_to=600)


def within(runs: Path, given: Config) -> Config:
    return given.model_copy(update={"run": given.run.model_copy(update={"dir": str(runs)})})


def test_a_vision_language_checkpoint_has_the_values_of_its_language_model(tmp_path: Path) -> None:
    text = {"model_type": "qwen3_5_text", "hidden_size": 64, "vocab_size": 512}
    for beside, within_text in ((True, {}), (False, {"tie_word_embeddings": True}), (False, {})):
        saved = {"model_type": "qwen3_5", "tie_word_embeddings": beside, "vision_config": {"hidden_size": 32}}
        (tmp_path / "config.json").write_text(json.dumps(saved | {"text_config": text | within_text}))
        hf = families.resolve_hf_config(config("qwen3.5-9b", path=str(tmp_path)))
        assert (hf["model_type"], hf["hidden_size"], hf["vocab_size"]) == ("qwen3_5_text", 64, 512)
        assert hf["tie_word_embeddings"] is (beside or bool(within_text))
    with pytest.raises(PlanError, match=r"holds a qwen3_5_text model, and model\.name = qwen3-8b is of qwen3"):
        families.resolve_hf_config(config("qwen3-8b", path=str(tmp_path)))


def test_a_begun_run_knows_the_weights_it_began_with_when_they_are_gone(tmp_path: Path) -> None:
    weights, run = tmp_path / "weights", tmp_path / "test"
    for directory in (weights, run):
        directory.mkdir()
    begun = within(tmp_path, config("qwen2.5-0.5b", path=str(weights), resize_vocab_to=576))
    hf = families.resolve_hf_config(config("qwen2.5-0.5b", {"hidden_size": 56, "vocab_size": 512}))
    (weights / "config.json").write_text(json.dumps(hf))
    wanted = families.resolve_hf_config(begun)
    assert (wanted["hidden_size"], wanted["vocab_size"]) == (56, 576)
    (run / "resolved.json").write_text(begun.model_dump_json())
    (run / "plan.json").write_text(json.dumps({"hf_config": wanted}))
    weights.rename(tmp_path / "gone")
    assert families.resolve_hf_config(begun) == wanted
    other = within(tmp_path, config("qwen2.5-0.5b", path="Qwen/Qwen2.5-0.5B"))
    assert families.resolve_hf_config(other)["hidden_size"] == 896, (
        "what was written down says nothing of other weights"
    )


def test_no_id_of_a_foreign_vocabulary() -> None:
    hf = families.resolve_hf_config(config("starcoder2-3b", train=1000))
    assert [hf[f"{kind}_token_id"] for kind in ("bos", "eos", "pad")] == [None] * 3
    assert hf["use_cache"] is False


@pytest.mark.parametrize("family", families.FAMILIES.values(), ids=lambda family: family.name)
def test_special_tokens_are_complete(family: families.Family) -> None:
    tokens = family.special_tokens
    assert len(set(tokens.all)) == len(tokens.all)
    assert tokens.all[0] == tokens.end_of_text
    named = (tokens.pad, tokens.fim_prefix, tokens.fim_middle, tokens.fim_suffix, tokens.file)
    assert {token for token in named if token} <= set(tokens.all)
    assert tokens.has_fim == (family.name not in {"qwen2", "qwen2-moe"})
    assert (
        bool(tokens.repository)
        == bool(tokens.file)
        == (family.name not in {"qwen2", "qwen2-moe", "codeqwen1.5", "santacoder"})
    )


def test_ids_of_starcoder_1() -> None:
    every = families.FAMILIES["starcoder"].special_tokens.all
    assert (every.index("<fim_prefix>"), every.index("<filename>"), every.index("<reponame>")) == (1, 5, 18)


def test_the_expressions_are_valid_for_tokenizers() -> None:
    from tokenizers import Regex, pre_tokenizers

    cut = pre_tokenizers.Split(Regex(families.FAMILIES["qwen3"].pre_tokenizer_pattern), "isolated")
    assert [piece for piece, _ in cut.pre_tokenize_str("x12 = y\n")] == ["x", "1", "2", " =", " y", "\n"]


def test_no_torch_is_imported() -> None:
    import subprocess
    import sys

    code = "import sys, llm_training_toolkit.families, llm_training_toolkit.plan; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path.cwd())
    assert done.stdout.strip() == "False"
