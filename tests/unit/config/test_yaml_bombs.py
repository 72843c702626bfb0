"""YAML made to take all time or memory: refused in words, at once."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from llm_training_toolkit.config import load_config
from llm_training_toolkit.errors import ConfigError
from llm_training_toolkit.plan.forecast.cluster_file import read_hardware


def billion_laughs() -> str:
    lines = ["run: {name: bomb}", "x0: &x0 [lol, lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    lines += [f"x{level}: &x{level} [{', '.join([f'*x{level - 1}'] * 10)}]" for level in range(1, 9)]
    return "\n".join(lines)


BOMBS = {
    "aliases": (billion_laughs(), "values, those that aliases repeat counted"),
    "chain of aliases": ("\n".join(["x0: &x0 []", *(f"x{n}: &x{n} [*x{n - 1}]" for n in range(1, 200))]), "nested"),
    "deep list": ("run: " + "[" * 5000 + "]" * 5000, "nested more than 50 deep"),
    "deep mapping": ("run: " + "{a: " * 3000 + "1" + "}" * 3000, "nested more than 50 deep"),
    "comments": ("# nothing\n" * 200_000, "characters"),
    "long number": ("run: {name: x}\ntrain: {steps: " + "9" * 5000 + "}", "train"),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_bomb_is_refused_in_words(kind: str, tmp_path: Path) -> None:
    text, words = BOMBS[kind]
    (tmp_path / "bomb.yaml").write_text(text)
    began = time.monotonic()
    with pytest.raises(ConfigError, match=words):
        load_config(tmp_path / "bomb.yaml")
    assert time.monotonic() - began < 30, "seconds, on a slow machine; without limits it was minutes"


def test_a_deep_cluster_file_and_a_deep_override_are_refused_too(tmp_path: Path) -> None:
    deep = "[" * 5000 + "]" * 5000
    (tmp_path / "cluster.yaml").write_text(f"metadata: {deep}")
    with pytest.raises(ConfigError, match="nested more than"):
        read_hardware(tmp_path / "cluster.yaml")
    (tmp_path / "run.yaml").write_text("run: {name: x}")
    with pytest.raises(ConfigError, match="nested more than"):
        load_config(tmp_path / "run.yaml", [f"model.config_overrides={deep}"])


def test_anchors_of_a_person_still_work(tmp_path: Path) -> None:
    source = "{path: /a, format: text}"
    text = f"""
run: {{name: x}}
model: {{name: qwen3-0.6b}}
tokenizer: {{path: /t}}
data: {{sequence_length: 64, sources: [&one {source}, *one]}}
train: {{steps: 1, global_batch_size: 1}}
"""
    (tmp_path / "run.yaml").write_text(text)
    assert len(load_config(tmp_path / "run.yaml").data.sources) == 2
