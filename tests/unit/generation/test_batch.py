"""Several prompts in one batch: each gets the answer that it would get alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig

from llm_training_toolkit import families
from llm_training_toolkit.config import parse_config
from llm_training_toolkit.data.tokenizer import TokenizationSpec, train_tokenizer
from llm_training_toolkit.generation.batch import BatchRow, FinishReason, _RowSampler, generate_batch, select_batch
from llm_training_toolkit.generation.generator import TextGenerator, TokenizedPrompt
from llm_training_toolkit.models import build_model
from llm_training_toolkit.models.sampling import SamplingParams
from tiny_models import SHAPES, one_thread

VOCABULARY = 300


class Listener:
    """Collects an answer; leaves after `patience` pieces."""

    def __init__(self, patience: int = 1000) -> None:
        self.text, self.patience = "", patience
        self.end: tuple[FinishReason, int] | None = None

    def on_text(self, piece: str) -> None:
        self.text += piece
        self.patience -= 1

    def on_finish(self, reason: FinishReason, new_tokens: int) -> None:
        self.end = (reason, new_tokens)

    def is_cancelled(self) -> bool:
        return self.patience <= 0


def row(prompt: int, new_tokens: int, **fields: Any) -> BatchRow:
    """A row of a prompt of so many tokens."""
    ids = [20 + (7 * place + prompt) % 250 for place in range(prompt)]
    how = SamplingParams(new_tokens, fields.pop("temperature", 0.0), fields.pop("seed", 0), fields.pop("top_p", 1.0))
    return BatchRow(TokenizedPrompt(ids, fields.pop("end_ids", frozenset())), how, Listener(), **fields)


def answers(generator: TextGenerator, rows: list[BatchRow]) -> list[tuple[str, object]]:
    with one_thread():
        generate_batch(generator, rows)
    return [(each.listener.text, each.listener.end) for each in rows]  # type: ignore[attr-defined]


def build_generator(size: str, tokenizer: Path) -> TextGenerator:
    raw: dict[str, Any] = {
        "run": {"name": "a"},
        "model": {"name": size, "config_overrides": {**SHAPES[size], "vocab_size": VOCABULARY}},
        "tokenizer": {"path": "a"},
        "data": {"sequence_length": 64, "sources": [{"path": "a", "format": "code"}]},
        "train": {"steps": 1},
    }
    torch.manual_seed(0)
    hf = families.resolve_hf_config(parse_config(raw, "test"))
    model: Any = build_model(hf, precision="fp32", attention="sdpa").eval()
    model.generation_config = GenerationConfig()
    model.config.use_cache = True
    return TextGenerator(model, tokenizer)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    spec = TokenizationSpec.from_family(families.find_size("starcoder2-3b").family)
    train_tokenizer(["def area(a, b):\n    return a * b\n"] * 2, VOCABULARY + 50, spec, path)
    return path


@pytest.mark.parametrize("size", ["qwen3-0.6b", "starcoder2-3b", "starcoderbase-1b", "qwen3.5-4b"])
def test_rows_of_a_batch_are_answered_as_if_alone(size: str, tokenizer: Path) -> None:
    generator = build_generator(size, tokenizer)

    def rows() -> list[BatchRow]:
        sampled = row(40, 9, temperature=1.0, seed=3, top_p=0.8)
        return [row(5, 12), sampled, row(17, 20, temperature=0.7, seed=4), row(30, 3)]

    together = answers(generator, rows())
    assert together == [answers(generator, [each])[0] for each in rows()]
    assert [end for _, end in together] == [("length", 12), ("length", 9), ("length", 20), ("length", 3)]


def test_a_row_ends_by_itself_while_others_continue(tokenizer: Path) -> None:
    generator = build_generator("qwen3-0.6b", tokenizer)
    (text, _), *_ = answers(generator, [row(5, 30)])
    leaving = row(5, 30)
    leaving.listener.patience = 4  # type: ignore[attr-defined]
    found = answers(
        generator,
        [row(5, 30), row(5, 30, stops=(text[6:9],)), leaving, row(5, 30, end_ids=frozenset(range(VOCABULARY)))],
    )
    assert found[0] == (text, ("length", 30))
    assert found[1][0] == text[: text.index(text[6:9])]
    assert [end[0] for _, end in found] == ["length", "stop", "cancelled", "stop"]  # type: ignore[index]
    assert found[3] == ("", ("stop", 1))


@pytest.mark.slow
def test_adapters_without_a_task_type_are_generated_with_as_asked(tokenizer: Path) -> None:
    generator = build_generator("qwen3-0.6b", tokenizer)
    how = SamplingParams(30, temperature=1.0, seed=1)
    wanted = generator.complete_prompt("def area(", how).text
    batch = answers(generator, [row(5, 30)])
    model: Any = get_peft_model(generator.model, LoraConfig(r=2, target_modules=["q_proj"]))  # changes no logit yet
    model.get_base_model().generation_config = GenerationConfig(eos_token_id=list(range(VOCABULARY)))
    adapted = TextGenerator(model, tokenizer)
    assert answers(adapted, [row(5, 30)]) == batch
    adapted._eos_ids = frozenset()
    assert adapted.complete_prompt("def area(", how).text == wanted


def test_a_batch_takes_the_oldest_row_and_those_that_fit_beside_it() -> None:
    first, long, short, last = row(10, 20), row(70, 20), row(20, 30), row(1, 1)
    assert select_batch([first, long, short, last], context=64, size=8) == [first, short, last]
    assert select_batch([first, long, short, last], context=64, size=2) == [first, short]
    assert select_batch([long, short], context=64, size=8) == [long]
    assert select_batch([], context=64, size=8) == []


def test_draws_follow_the_softmax_and_its_nucleus() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    count = 1000

    def frequencies(**how: Any) -> torch.Tensor:
        rows = [row(1, 1, seed=seed, **how) for seed in range(count)]
        chosen = _RowSampler(rows, torch.device("cpu"))(torch.ones(count, 1), logits.expand(count, -1)).argmax(-1)
        return torch.bincount(chosen, minlength=4) / count

    torch.testing.assert_close(frequencies(temperature=1.0), logits[0].softmax(-1), atol=0.06, rtol=0)
    torch.testing.assert_close(frequencies(temperature=2.0), (logits[0] / 2).softmax(-1), atol=0.06, rtol=0)
    nucleus = torch.tensor([0.7311, 0.2689, 0.0, 0.0])
    torch.testing.assert_close(frequencies(temperature=1.0, top_p=0.8), nucleus, atol=0.06, rtol=0)
    assert frequencies(temperature=0.0)[0] == 1
