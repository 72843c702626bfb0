"""The tokenizer: trained ones open in transformers, and text stays text."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_training_toolkit.data.tokenizer import TextEncoder, TokenizationSpec, open_tokenizer, train_tokenizer
from llm_training_toolkit.errors import DataError

TEXTS = ["def f(x):\n    return x  # é 漢字 😀\n" * 3, "for i in range(10):\n\tprint(i)\r\n", "\x00\u200b  \n\n  end "]


def test_training_gives_the_markers_the_first_ids_and_repeats_exactly(
    tmp_path: Path, markers: TokenizationSpec
) -> None:
    for name in ("one", "two"):
        train_tokenizer(TEXTS, 320, markers, tmp_path / name)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    encoder = open_tokenizer(str(tmp_path / "one"))
    assert [encoder.get_special_token_id(marker) for marker in markers.tokens.all] == [0, 1, 2, 3, 4]
    assert 5 + 256 < encoder.vocab_size <= 320


@pytest.mark.parametrize("model_type", [None, "qwen3", "starcoder2", "gpt_bigcode"])
def test_transformers_opens_it_and_agrees(tmp_path: Path, markers: TokenizationSpec, model_type: str | None) -> None:
    transformers = pytest.importorskip("transformers")
    train_tokenizer(TEXTS, 320, markers, tmp_path)
    if model_type:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}), encoding="utf-8")
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), open_tokenizer(str(tmp_path))
    assert (theirs.eos_token, theirs.eos_token_id) == ("<|endoftext|>", 0)
    assert (theirs.pad_token, theirs.pad_token_id) == ("<fim_pad>", 4)
    assert set(markers.tokens.all) <= set(theirs.all_special_tokens)
    for text in [*TEXTS, "a , b 's n't ."]:
        assert theirs(text)["input_ids"] == ours.encode(text)
        assert theirs.decode(ours.encode(text)) == text
    assert theirs.encode("<fim_middle>x")[0] == 2


@given(text=st.text(max_size=80))
def test_round_trip_and_byte_counts_are_exact(encoder: TextEncoder, text: str) -> None:
    ids = encoder.encode(text)
    assert encoder.decode(ids) == text
    assert int(encoder.count_bytes_per_token()[ids].sum()) == len(text.encode())
    assert [each.ids.tolist() for each in encoder.encode_batch([text, "x"])] == [ids, encoder.encode("x")]


@given(text=st.text(max_size=60))
def test_spans_cover_the_text(encoder: TextEncoder, text: str) -> None:
    [encoded] = encoder.encode_batch([text])
    assert encoded.ids.tolist() == encoder.encode(text)
    assert len(encoded.starts_character) == len(encoded.char_spans) == len(encoded.ids)
    spans = encoded.char_spans.tolist()
    assert {i for start, stop in spans for i in range(start, stop)} == set(range(len(text)))
    for cut in np.flatnonzero(encoded.starts_character).tolist():
        place = spans[cut][0]
        assert encoder.decode(encoded.ids[:cut]) == text[:place]
        assert encoder.decode(encoded.ids[cut:]) == text[place:]


@pytest.fixture(scope="module")
def composing(tokenizer_path: Path, tmp_path_factory: pytest.TempPathFactory) -> TextEncoder:
    """The same tokenizer with Qwen's normalizer, which writes e and a combining accent as one character."""
    content = json.loads((tokenizer_path / "tokenizer.json").read_text(encoding="utf-8"))
    path = tmp_path_factory.mktemp("composing")
    (path / "tokenizer.json").write_text(json.dumps({**content, "normalizer": {"type": "NFC"}}), encoding="utf-8")
    return open_tokenizer(str(path))


@given(
    text=st.text(
        st.sampled_from("ae\u0301\u0327\u212b\u1100\u1161漢😀 \n(") | st.characters(codec="utf-8"), max_size=40
    )
)
def test_spans_are_those_the_library_follows(encoder: TextEncoder, composing: TextEncoder, text: str) -> None:
    for each in (encoder, composing):
        [encoded] = each.encode_batch([text])
        followed = each._tokenizer.encode(text, add_special_tokens=False)
        assert encoded.ids.tolist() == followed.ids
        assert [tuple(span) for span in encoded.char_spans.tolist()] == followed.offsets


def test_marker_text_in_a_document_stays_text(encoder: TextEncoder, markers: TokenizationSpec) -> None:
    for marker in markers.tokens.all:
        ids = encoder.encode(f"x {marker} y")
        assert encoder.get_special_token_id(marker) not in ids
        assert encoder.decode(ids) == f"x {marker} y"


def test_markers_that_a_family_does_not_call_special_stay_text_too(tokenizer_path: Path, tmp_path: Path) -> None:
    content = json.loads((tokenizer_path / "tokenizer.json").read_text(encoding="utf-8"))
    for token in content["added_tokens"]:
        token["special"] = False  # as Qwen has it for its fill-in-the-middle markers
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    encoder = open_tokenizer(str(tmp_path))
    assert encoder.get_special_token_id("<fim_middle>") not in encoder.encode("<fim_middle>")


def test_what_a_file_says_about_cutting_padding_and_adding_is_not_done(tokenizer_path: Path, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_path / "tokenizer.json"))
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=50)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    plain = open_tokenizer(str(tokenizer_path)).encode("return first + second")
    assert open_tokenizer(str(tmp_path)).encode("return first + second") == plain
    assert len(plain) > 3


def test_errors_say_what_is_missing(tmp_path: Path, encoder: TextEncoder, markers: TokenizationSpec) -> None:
    with pytest.raises(DataError, match="'<absent>'"):
        encoder.get_special_token_id("<absent>")
    with pytest.raises(DataError, match="'def'"):
        encoder.get_special_token_id("def")
    with pytest.raises(DataError, match=r"no tokenizer\.json"):
        open_tokenizer(str(tmp_path))
    with pytest.raises(DataError, match="261"):
        train_tokenizer([], 260, markers, tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(DataError, match="is no tokenizer"):
        open_tokenizer(str(tmp_path))


def test_a_hub_id_that_cannot_be_had_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_args: object, **_keywords: object) -> str:
        raise OSError("no route to the hub")

    monkeypatch.setattr("llm_training_toolkit.data.tokenizer.snapshot_download", offline)
    with pytest.raises(DataError, match=r"Qwen/absent.*no route to the hub"):
        open_tokenizer("Qwen/absent")
