"""Infilling: gaps are drawn from the content alone, and asked for as the model was trained."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from known_model import CONTEXT, KNOWN, PROBLEM, SOLUTION
from llm_training_toolkit import families
from llm_training_toolkit.data.sources import Document
from llm_training_toolkit.data.tokenizer import TokenizationSpec, train_tokenizer
from llm_training_toolkit.errors import DataError, PlanError
from llm_training_toolkit.evaluation.infill import draw_gap, measure_infill
from llm_training_toolkit.evaluation.model import EvalModel
from llm_training_toolkit.evaluation.task import EvalResult, GapKind, InfillTask


def measured(subject: EvalModel, **settings: Any) -> EvalResult:
    return measure_infill(InfillTask(**settings), subject, lambda _stage, _done, _total: None)


@given(st.text(alphabet=" \n\tabcdé😀", max_size=300), st.sampled_from(["line", "span"]), st.integers(0, 3))
def test_a_gap_is_a_piece_worth_filling_and_nothing_is_lost(text: str, kind: GapKind, seed: int) -> None:
    gap = draw_gap(Document(0, "a", text), kind, seed)
    assert gap == draw_gap(Document(0, "a", text), kind, seed)
    if gap is None:
        assert all(len("".join(line.split())) < 4 or len(line) > 200 for line in text.split("\n")[1:])
        return
    assert gap.prefix + gap.middle + gap.suffix == text
    assert len("".join(gap.middle.split())) >= 4
    if kind == "line":
        assert "\n" not in gap.middle
        assert gap.prefix.endswith("\n")
        assert not gap.suffix or gap.suffix.startswith("\n")
    else:
        assert len(gap.middle) <= 120


def test_gaps_differ_by_seed_and_by_document() -> None:
    texts = [f"first_{i} = 1\nsecond_{i} = 2\nthird_{i} = 3\n" for i in range(30)]
    found = {seed: [draw_gap(Document(0, "a", text), "line", seed) for text in texts] for seed in (0, 1)}
    places = {seed: [gap.prefix.count("\n") for gap in gaps if gap] for seed, gaps in found.items()}
    assert set(places[0]) == {1, 2}  # nothing stands before the first line
    assert places[0] != places[1]


def test_a_model_that_knows_the_gap_fills_it(known_model: Path, known_document: Path) -> None:
    found = measured(EvalModel(known_model, device="cpu"), data=str(known_document))
    assert found.figures["exact_match"] == found.figures["edit_similarity"] == found.figures["ended"] == 1.0
    [item] = found.items
    assert item["wanted"] == item["written"]
    assert item["wanted"] in KNOWN
    assert 0.0 < found.figures["bits_per_byte"] < 0.1


def test_the_batch_changes_nothing(known_model: Path, tmp_path: Path) -> None:
    for number in range(6):
        (tmp_path / f"{number}.py").write_text(KNOWN.replace("area", f"area_{number}" * (1 + number)))
    subject = EvalModel(known_model, device="cpu")
    alone, together = (measured(subject, data=str(tmp_path), batch=batch, middle="span") for batch in (1, 4))
    assert alone.items == together.items
    assert alone.figures == pytest.approx(together.figures, rel=1e-5)  # rounding of the loss depends on it
    few = measured(subject, data=str(tmp_path), limit=2, middle="span")
    assert [item for item in together.items if item in few.items] == list(few.items)


def test_a_document_longer_than_the_context_is_shortened_around_its_gap(known_model: Path, tmp_path: Path) -> None:
    (tmp_path / "long.py").write_text("".join(f"value_{i} = {i}\n" for i in range(500)))
    found = measured(EvalModel(known_model, device="cpu"), data=str(tmp_path))
    assert found.figures["shortened"] == 1
    assert "do not fit the context" in found.notes[0]
    assert found.settings["tokens"] == CONTEXT // 4


def test_a_model_without_sentinels_is_refused_or_shown_the_prefix_alone(
    known_model: Path, known_document: Path, tmp_path: Path
) -> None:
    without = tmp_path / "qwen2"
    shutil.copytree(known_model, without)
    train_tokenizer([KNOWN] * 4, 512, TokenizationSpec.from_family(families.find_size("qwen2-0.5b").family), without)
    subject = EvalModel(without, device="cpu")
    with pytest.raises(PlanError, match="no fill-in-the-middle sentinels"):
        measured(subject, data=str(known_document))
    assert measured(subject, data=str(known_document), given="prefix").figures["documents"] == 1


def test_a_line_that_is_known_follows_its_prefix(known_model: Path, tmp_path: Path) -> None:
    document = tmp_path / "function.py"
    document.write_text(PROBLEM["prompt"] + SOLUTION)
    gaps = {seed: draw_gap(Document(0, "f", document.read_text()), "line", seed) for seed in range(99)}
    seed = next(seed for seed, gap in gaps.items() if gap and gap.middle == "    return twice")
    found = measured(EvalModel(known_model, device="cpu"), data=str(document), given="prefix", seed=seed)
    assert found.figures["exact_match"] == found.figures["ended"] == 1.0
    assert 0.0 < found.figures["bits_per_byte"] < 0.2
    with pytest.raises(PlanError, match="only with --middle line"):
        measured(EvalModel(known_model, device="cpu"), data=str(document), given="prefix", middle="span")


@torch.no_grad()
def test_the_bits_of_a_middle_are_those_of_its_tokens_one_by_one(known_model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("first = 1\n\nsecond = 2\n\nthird = 3\n")
    subject = EvalModel(known_model, device="cpu")
    found = measured(subject, data=str(tmp_path), given="prefix")
    [item] = found.items
    text = (tmp_path / "a.py").read_text()
    before = subject.text_encoder.encode(text[: text.index(item["wanted"])])
    breaks = "\n\n" if "second" in item["wanted"] else "\n"
    answer = subject.text_encoder.encode(item["wanted"] + breaks)
    logits = subject.language_model(torch.tensor([before + answer])).logits[0, len(before) - 1 : -1].log_softmax(-1)
    nats = -float(logits.gather(1, torch.tensor(answer)[:, None]).sum())
    assert found.figures["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(item["wanted"]), rel=1e-5)


def test_nothing_to_fill_is_said(known_model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("a\n\nb\n")
    with pytest.raises(DataError, match="no document has a line"):
        measured(EvalModel(known_model, device="cpu"), data=str(tmp_path))
    with pytest.raises(PlanError, match="belongs to no run"):
        measured(EvalModel(known_model, device="cpu"))
