"""Perplexity: the sum of the token losses that plain transformers gives, whatever the packing and the windows."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from known_model import CONTEXT, KNOWN
from llm_training_toolkit.data.tokenizer import open_tokenizer
from llm_training_toolkit.data.types import Example
from llm_training_toolkit.errors import DataError, PlanError
from llm_training_toolkit.evaluation.model import EvalModel
from llm_training_toolkit.evaluation.perplexity import measure_perplexity, split_into_windows
from llm_training_toolkit.evaluation.task import EvalResult, PerplexityTask


def measured(subject: EvalModel, **settings: Any) -> EvalResult:
    return measure_perplexity(PerplexityTask(**settings), subject, lambda _stage, _done, _total: None)


def losses(known_model: Path, ids: list[int]) -> Any:
    """(tokens - 1,) loss of each token, by plain transformers."""
    model = AutoModelForCausalLM.from_pretrained(known_model).eval()
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1]
    return F.cross_entropy(logits.double(), torch.tensor(ids[1:]), reduction="none")


def test_it_is_the_loss_that_transformers_gives_each_document(known_model: Path, tmp_path: Path) -> None:
    texts = [KNOWN, KNOWN.upper(), "x = 1\n", "# é 漢字\n" * 3]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.py").write_text(text)
    encoder = open_tokenizer(str(known_model))
    end = encoder.get_special_token_id("<|endoftext|>")
    each = [losses(known_model, [*encoder.encode(text), end]) for text in texts]
    total, tokens = sum(float(one.sum()) for one in each), sum(map(len, each))
    first = sum(len(encoder.decode(encoder.encode(text)[:1]).encode()) for text in texts)
    size = sum(len(text.encode()) for text in texts) - first
    for batch in (1, 8):
        found = measured(EvalModel(known_model, device="cpu"), data=str(tmp_path), batch=batch).figures
        assert found["loss"] == pytest.approx(total / tokens, rel=1e-5)
        assert found["perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-4)
        assert found["bits_per_byte"] == pytest.approx(total / math.log(2) / size, rel=1e-5)
        assert (found["tokens"], found["bytes"], found["documents"]) == (tokens, size, 4)


def test_a_stride_gives_every_token_the_context_before_it(known_model: Path, tmp_path: Path) -> None:
    text = KNOWN * 8
    (tmp_path / "long.py").write_text(text)
    encoder = open_tokenizer(str(known_model))
    ids = [*encoder.encode(text), encoder.get_special_token_id("<|endoftext|>")]
    stride, total, seen = 50, 0.0, 0
    for start in range(0, len(ids), stride):
        stop = min(start + CONTEXT, len(ids))
        total += float(losses(known_model, ids[start:stop])[max(seen - start - 1, 0) :].sum())
        seen = stop
        if stop == len(ids):
            break
    subject = EvalModel(known_model, device="cpu")
    found = measured(subject, data=str(tmp_path), stride=stride).figures
    assert found["tokens"] == len(ids) - 1
    assert found["loss"] == pytest.approx(total / (len(ids) - 1), rel=1e-5)
    assert measured(subject, data=str(tmp_path)).figures["tokens"] < len(ids) - 1, "each chunk begins without a loss"


@given(st.integers(2, 60).flatmap(lambda c: st.tuples(st.integers(1, 200), st.just(c), st.integers(1, c - 1))))
def test_windows_predict_every_token_once_behind_enough_others(drawn: tuple[int, int, int]) -> None:
    length, context, stride = drawn
    example = Example(np.arange(length, dtype=np.uint32), np.ones(length, dtype=np.bool_), 0)
    predicted: Counter[int] = Counter()
    for window in split_into_windows(example, context, stride):
        assert len(window.tokens) <= context
        for place in range(1, len(window.tokens)):
            if window.loss[place]:
                token = int(window.tokens[place])
                predicted[token] += 1
                assert place >= min(token, context - stride)
    assert predicted == Counter(range(1, length))


def test_wrong_requests_are_said(known_model: Path, tmp_path: Path) -> None:
    subject = EvalModel(known_model, device="cpu")
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(DataError, match="nothing to predict"):
        measured(subject, data=str(tmp_path), format="text")
    with pytest.raises(PlanError, match="--stride"):
        measured(subject, data=str(tmp_path), stride=CONTEXT)
    with pytest.raises(PlanError, match="the model has 192 positions"):
        measured(EvalModel(known_model, device="cpu", context=CONTEXT + 1), data=str(tmp_path))
    with pytest.raises(PlanError, match="belongs to no run"):
        measured(subject)


def test_conversations_count_what_the_assistant_says(known_model: Path, tmp_path: Path) -> None:
    chats = tmp_path / "chats.jsonl"
    chats.write_text(
        '{"messages": [{"role": "user", "content": "width?"}, {"role": "assistant", "content": "height"}]}'
    )
    found = measured(EvalModel(known_model, device="cpu"), data=str(chats), format="chat").figures
    assert 0 < found["tokens"] < 30
    assert found["documents"] == 1
