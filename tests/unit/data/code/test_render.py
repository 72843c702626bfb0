"""Rendering: no token lost, fill-in-the-middle as StarCoder defines it, drawn from coordinates alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_training_toolkit.config.source_config import SourceConfig
from llm_training_toolkit.data.code.fim import FimRules, draw_uniform_numbers
from llm_training_toolkit.data.code.render import render_code
from llm_training_toolkit.data.code.rules import RenderRules
from llm_training_toolkit.data.prepare.packing import pack_examples
from llm_training_toolkit.data.sources import Document
from llm_training_toolkit.data.tokenizer import TextEncoder, TokenizationSpec
from llm_training_toolkit.data.types import Example, RenderedDocument
from llm_training_toolkit.errors import DataError

END, PREFIX, MIDDLE, SUFFIX = 0, 1, 2, 3
ALWAYS = FimRules(PREFIX, MIDDLE, SUFFIX, rate=1.0, spm_rate=0.5, middle_only=False)


def one(text: str, rules: RenderRules, encoder: TextEncoder, number: int = 0) -> RenderedDocument:
    return render_code([(number, Document(0, f"file{number}.py", text))], rules, encoder)[0]


def parts(example: Example) -> tuple[list[int], list[int], list[int]] | None:
    """Prefix, middle and suffix of a rearranged example; in suffix-first order prefix and middle come as one prefix."""
    tokens = example.tokens.tolist()
    if tokens[0] != PREFIX:
        return None
    suffix, middle = tokens.index(SUFFIX), tokens.index(MIDDLE)
    return tokens[1:suffix], tokens[middle + 1 : -1], tokens[suffix + 1 : middle]


def restored(example: Example, encoder: TextEncoder) -> str:
    pieces = parts(example)
    if pieces is None:
        return encoder.decode(example.tokens, skip_special_tokens=True)
    return "".join(encoder.decode(piece) for piece in pieces)


def test_a_document_is_its_tokens_and_the_end_all_of_them_with_loss(encoder: TextEncoder) -> None:
    rendered = one("return first", RenderRules(16, END), encoder, number=7)
    (example,) = rendered.examples
    assert example.tokens.tolist() == [*encoder.encode("return first"), END]
    assert example.tokens.dtype == np.uint32
    assert example.loss.all()
    assert (example.document, rendered.tokens) == (7, len(example.tokens))


@given(text=st.text(min_size=1, max_size=200), length=st.integers(16, 24))
def test_a_long_document_is_cut_without_losing_a_token(encoder: TextEncoder, text: str, length: int) -> None:
    examples = one(text, RenderRules(length, END), encoder).examples
    assert np.concatenate([example.tokens for example in examples]).tolist() == [*encoder.encode(text), END]
    assert all(2 <= len(example.tokens) <= length for example in examples)
    # Cut between characters: no piece begins or ends with half of one, which would show as U+FFFD.
    assert "".join(encoder.decode(e.tokens, skip_special_tokens=True) for e in examples) == text


@given(
    text=st.text(alphabet="ab é漢😀\n(", min_size=1, max_size=150),
    seed=st.integers(0, 50),
    length=st.integers(16, 40),
)
def test_rearranging_restores_the_document_and_never_overflows(
    encoder: TextEncoder, text: str, seed: int, length: int
) -> None:
    examples = one(text, RenderRules(length, END, fim=ALWAYS, seed=seed), encoder).examples
    assert "".join(restored(example, encoder) for example in examples) == text
    for example in examples:
        assert len(example.tokens) <= length
        counts = Counter(example.tokens.tolist())
        rearranged = parts(example) is not None
        assert [counts[PREFIX], counts[MIDDLE], counts[SUFFIX]] == [int(rearranged)] * 3
        assert counts[END] == (1 if rearranged else int(example is examples[-1]))
    assert examples[-1].tokens[-1] == END


@given(text=st.text(alphabet="ab é漢😀\n(", min_size=400, max_size=600), seed=st.integers(0, 50))
def test_a_chunk_that_gets_too_long_is_cut_in_two_and_not_left_plain(
    encoder: TextEncoder, text: str, seed: int
) -> None:
    rendered = one(text, RenderRules(64, END, fim=ALWAYS, seed=seed), encoder)
    assert rendered.tokens > 2 * 64
    assert all(parts(example) is not None for example in rendered.examples)
    assert "".join(restored(example, encoder) for example in rendered.examples) == text


def code_of_ragged_lengths(documents: int) -> list[tuple[int, Document]]:
    """Code of lengths as repositories have them: most are short, and a few hold half of the text."""
    generator = np.random.default_rng(8)
    names = ["first", "second", "value", "self", "größe", "x"]
    found = []
    for number, lines in enumerate(generator.lognormal(3.0, 1.2, documents).astype(int) + 1):
        chosen = generator.integers(0, [6, 6, 1000], (lines, 3)).tolist()
        text = "".join(f"    {names[a]}_{c} = {names[b]}({c}) + {c % 7}\n" for a, b, c in chosen)
        found.append((number, Document(0, f"{number}.py", text)))
    return found


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("rate", [0.0, 0.5, 1.0])
def test_sequences_are_full_where_documents_continue(encoder: TextEncoder, rate: float, whole: bool) -> None:
    fim = replace(ALWAYS, rate=rate, whole=whole)
    rendered = render_code(code_of_ragged_lengths(120), RenderRules(256, END, fim=fim, seed=1), encoder)
    lengths = np.array([len(example.tokens) for each in rendered for example in each.examples])
    assert lengths.sum() > 200 * 256
    assert lengths.sum() / (256 * len(pack_examples(lengths, 256, targets=lengths))) > 0.99


def split_by_hand(text: str, seed: int, epoch: int, document: int) -> tuple[str, str, str]:
    chance = draw_uniform_numbers(seed, epoch, 0, document, "0")
    first, second = sorted((int(chance.first * (len(text) + 1)), int(chance.second * (len(text) + 1))))
    return text[:first], text[first:second], text[second:]


@pytest.mark.parametrize("middle_only", [False, True])
@pytest.mark.parametrize("spm_rate", [0.0, 1.0])
def test_both_orders_and_both_losses(encoder: TextEncoder, spm_rate: float, middle_only: bool) -> None:
    text = "def add(first, second)"
    fim = replace(ALWAYS, spm_rate=spm_rate, middle_only=middle_only)
    (example,) = one(text, RenderRules(64, END, fim=fim, seed=5, epoch=3), encoder, number=9).examples
    p, m, s = (encoder.encode(part) for part in split_by_hand(text, 5, 3, 9))
    psm = [PREFIX, *p, SUFFIX, *s, MIDDLE, *m, END]
    spm = [PREFIX, SUFFIX, *s, MIDDLE, *p, *m, END]
    assert example.tokens.tolist() == (spm if spm_rate else psm)
    with_loss = len(m) + 1 if middle_only else len(psm)
    assert example.loss.tolist() == [False] * (len(psm) - with_loss) + [True] * with_loss


def test_the_draw_is_the_same_in_every_version() -> None:
    assert draw_uniform_numbers(42, 1, 0, 17, "0") == pytest.approx(
        (0.6285974471478821, 0.5704583421059345, 0.30572986033156346, 0.7034828540735285)
    )


def test_rates_are_as_asked(encoder: TextEncoder) -> None:
    fim = replace(ALWAYS, rate=0.5, spm_rate=0.25)
    documents = [(i, Document(0, str(i), "first + second")) for i in range(4000)]
    examples = [
        r.examples[0].tokens.tolist() for r in render_code(documents, RenderRules(64, END, fim=fim, seed=3), encoder)
    ]
    plain = sum(tokens[0] != PREFIX for tokens in examples)
    suffix_first = sum(
        draw_uniform_numbers(3, 0, 0, i, "0").rearrange < 0.5 and draw_uniform_numbers(3, 0, 0, i, "0").order < 0.25
        for i in range(4000)
    )
    observed = np.array([plain, suffix_first, 4000 - plain - suffix_first])
    expected = 4000 * np.array([0.5, 0.125, 0.375])
    assert ((observed - expected) ** 2 / expected).sum() < 13.8  # chi-square, 2 degrees of freedom, p = 0.001


def test_cuts_are_uniform_over_places() -> None:
    places = np.array(
        [[int(d.first * 5), int(d.second * 5)] for d in (draw_uniform_numbers(0, 0, 0, i, "0") for i in range(5000))]
    )
    table = np.histogram2d(places[:, 0], places[:, 1], bins=5)[0]
    assert ((table - 200) ** 2 / 200).sum() < 51.2  # 24 degrees of freedom, p = 0.001


def test_neither_company_nor_order_changes_an_example(encoder: TextEncoder) -> None:
    rules = RenderRules(32, END, fim=ALWAYS, seed=1)
    documents = [(i, Document(0, str(i), f"value_{i} = {i} " * (1 + i % 9))) for i in range(30)]
    together = render_code(documents, rules, encoder)
    alone = [render_code([item], rules, encoder)[0] for item in reversed(documents)][::-1]
    for a, b in zip(together, alone, strict=True):
        assert [e.tokens.tolist() for e in a.examples] == [e.tokens.tolist() for e in b.examples]
    other = render_code(documents, replace(rules, epoch=1), encoder)
    assert any(
        len(a.examples[0].tokens) != len(b.examples[0].tokens) or (a.examples[0].tokens != b.examples[0].tokens).any()
        for a, b in zip(together, other, strict=True)
    )


def test_marker_text_stays_text_when_rearranged(encoder: TextEncoder) -> None:
    text = "s = '<fim_middle><|endoftext|>'"
    (example,) = one(text, RenderRules(128, END, fim=ALWAYS), encoder).examples
    counts = Counter(example.tokens.tolist())
    assert (counts[MIDDLE], counts[END]) == (1, 1)
    assert restored(example, encoder) == text


def test_too_long_drops_or_stops_with_the_document_named(encoder: TextEncoder) -> None:
    text = "漢" * 30
    dropped = one(text, RenderRules(16, END, overlong="drop"), encoder)
    assert not dropped.examples
    assert dropped.tokens == len(encoder.encode(text)) + 1
    with pytest.raises(DataError, match=rf"file3\.py: {dropped.tokens} tokens.*16"):
        one(text, RenderRules(16, END, overlong="error"), encoder, number=3)


def test_a_family_without_the_markers_is_refused(encoder: TextEncoder, markers: TokenizationSpec) -> None:
    source = SourceConfig.model_validate({"path": "x", "format": "code", "fim": {}})
    with pytest.raises(DataError, match="no fill-in-the-middle markers"):
        RenderRules.from_config(
            source, replace(markers, tokens=replace(markers.tokens, fim_middle="")), encoder, 64, seed=0, epoch=0
        )
    assert RenderRules.from_config(source, markers, encoder, 64, seed=0, epoch=0).fim == replace(ALWAYS, rate=0.5)
