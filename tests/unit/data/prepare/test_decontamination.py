"""Decontamination: ten words in sequence of a benchmark, in HumanEval's and MBPP's form or of one's own."""

from __future__ import annotations

import gzip
import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llm_training_toolkit.config.data_config import DecontaminationConfig
from llm_training_toolkit.config.schema import Config
from llm_training_toolkit.data.prepare.builder import DatasetBuilder, prepare_dataset
from llm_training_toolkit.data.prepare.decontamination import BenchmarkFilter
from llm_training_toolkit.data.prepare.shards import render_in_process
from llm_training_toolkit.data.tokenizer import TokenizationSpec
from llm_training_toolkit.errors import DataError
from record_sets import write_json_lines

Configure = Callable[..., Config]
PROMPT = 'def below(numbers, limit):\n    """Return whether every number of the list is below the limit."""\n'
HUMANEVAL: dict[str, str] = {
    "task_id": "Test/0",
    "prompt": PROMPT,
    "entry_point": "below",
    "canonical_solution": (
        "    for number in numbers:\n        if number >= limit:\n            return False\n    return True\n"
    ),
    "test": "def check(candidate):\n    assert candidate([1, 2], 3)\n",
}
MBPP = {
    "task_id": 2,
    "text": "Write a function to find the shared elements from the given two lists of numbers.",
    "code": "def similar(a, b):\n  return tuple(set(a) & set(b))",
    "test_list": ["assert similar((3, 4, 5, 6), (5, 7, 4, 10)) == (4, 5)"],
}


@pytest.fixture
def benchmarks(tmp_path: Path) -> tuple[str, ...]:
    humaneval = tmp_path / "HumanEval.jsonl.gz"
    humaneval.write_bytes(gzip.compress(json.dumps(HUMANEVAL).encode()))
    own = tmp_path / "own.py"
    own.write_text("def secret(one, two):\n    three = one + two\n    return three * three - one * two\n")
    mbpp = write_json_lines(tmp_path / "mbpp.jsonl", [MBPP])
    return tuple(map(str, (humaneval, mbpp, own)))


@pytest.mark.parametrize(
    ("text", "is_contaminated"),
    [
        (PROMPT, True),
        ("x = 1\n" + HUMANEVAL["canonical_solution"].upper().replace(" ", "\t"), True),
        ("# shared elements from the given two lists OF numbers, we write a function to find the shared", False),
        ("# Find the SHARED elements from the (given) two lists of numbers", True),
        ("assert similar((3,4,5,6),(5,7,4,10))==(4,5)", True),
        ("one, two: three = one + two; return three * three - one * two", True),
        ("for number in numbers:\n    if number >= limit:\n        print(number)", False),
        ("def below(numbers, limit): ...", False),
        ("", False),
    ],
)
def test_ten_words_in_sequence_are_found(benchmarks: tuple[str, ...], text: str, *, is_contaminated: bool) -> None:
    assert BenchmarkFilter(DecontaminationConfig(paths=benchmarks)).is_contaminated(text) == is_contaminated


def test_planted_benchmarks_are_found_and_nothing_else(tmp_path: Path) -> None:
    """200 documents, half of them with 10 to 20 words of a benchmark, in another case and punctuation."""
    rng = random.Random(11)
    words = ["".join(rng.choices("abcdefgh", k=4)) for _ in range(600)]
    tasks = [rng.choices(words, k=40) for _ in range(50)]
    path = write_json_lines(tmp_path / "benchmark.jsonl", [{"text": " ".join(task)} for task in tasks])
    checked = BenchmarkFilter(DecontaminationConfig(paths=(str(path),)))
    outcomes: Counter[tuple[bool, bool]] = Counter()
    for number in range(200):
        text, task = rng.choices(words, k=80), rng.choice(tasks)
        span = task[(begin := rng.randrange(21)) : begin + rng.randint(10, 20)]
        planted = span if number % 2 else span[:9]
        at = rng.randrange(80)
        text[at:at] = [rng.choice((word, word.upper(), f"({word})")) for word in planted]
        outcomes[bool(number % 2), checked.is_contaminated(rng.choice((" ", ", ", "\n")).join(text))] += 1
    assert outcomes == {(True, True): 100, (False, False): 100}  # recall and precision of 1


def test_contaminated_documents_are_counted_and_benchmarks_part_of_the_data(
    configure: Configure, markers: TokenizationSpec, corpus: Path, benchmarks: tuple[str, ...]
) -> None:
    (corpus / "leak.py").write_text("# copied\n" + PROMPT)
    settings: dict[str, Any] = {"decontamination": {"paths": benchmarks}}
    info = prepare_dataset(configure(**settings), markers).dataset_info
    (source,) = info.sources
    assert (source.documents, source.dropped) == (41, {"contaminated": 1})
    Path(benchmarks[2]).write_text(
        "one more benchmark of my own, which has about fifteen words or a few more than that"
    )
    builder = DatasetBuilder(configure(**settings), markers, None, render_in_process)
    assert builder.fingerprint != info.fingerprint


def test_conversations_are_compared_without_their_json(
    configure: Configure, markers: TokenizationSpec, tmp_path: Path, benchmarks: tuple[str, ...]
) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": text}]}
        for text in (PROMPT, "ok")
    ]
    path = write_json_lines(tmp_path / "chat.jsonl", rows)
    template = "{prompt}\n{completion}"
    config = configure(
        sources=[{"path": str(path), "format": "chat", "prompt_template": template}],
        eval={"fraction": 0.0},
        decontamination={"paths": benchmarks},
    )
    (source,) = prepare_dataset(config, markers).dataset_info.sources
    assert (source.documents, source.dropped) == (1, {"contaminated": 1})


@pytest.mark.parametrize(("name", "content"), [("none.jsonl", None), ("short.txt", "two words"), ("bad.jsonl", "{")])
def test_benchmark_that_cannot_be_used_is_refused(tmp_path: Path, name: str, content: str | None) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError):
        BenchmarkFilter(DecontaminationConfig(paths=(str(tmp_path / name),)))


def test_benchmark_that_would_be_cut_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "large.txt"
    path.write_bytes(b"one two three four five six seven eight nine ten\n")
    with path.open("r+b") as file:
        file.truncate((32 << 20) + 1)
    with pytest.raises(DataError, match=r"32 MiB.*\.jsonl"):
        BenchmarkFilter(DecontaminationConfig(paths=(str(path),)))
