"""Tune the experiment's first model by chat: asked for a function's docstring, it answers. Train, export, ask, measure.

python experiments/fim/chat.py    # after run.py; about four minutes on two cores
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RESULT = HERE / "chat.json"
LONGEST = 500
"""Characters of a function that is asked about: question and answer have to fit 256 tokens."""
HELD_OUT = 20
"""One module in so many is kept out."""
ASKED = 100
SHOWN = 5
Pair = dict[str, str]


def pairs(text: str) -> Iterator[Pair]:
    """What each short function of a module does: the function without its docstring, and the docstring's first line."""
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef):
            continue
        said = (ast.get_docstring(node) or "").partition("\n")[0].strip()
        if not said or len(node.body) < 2:
            continue
        node.body = node.body[1:]
        function = ast.unparse(node)
        if len(function) <= LONGEST and len(said) <= 100:
            yield {"prompt": f"What does this function do?\n\n{function}", "completion": said}


def write_pairs(directory: Path) -> tuple[Path, Path]:
    """The pairs of the standard library in two files: to train on, and held out by whole modules."""
    library = Path(sysconfig.get_paths()["stdlib"])
    parts: tuple[list[Pair], list[Pair]] = ([], [])
    seen: set[str] = set()
    for path in sorted(library.rglob("*.py")):
        if {"site-packages", "test", "tests", "idlelib"} & set(path.relative_to(library).parts):
            continue
        held = int(hashlib.sha256(path.name.encode()).hexdigest(), 16) % HELD_OUT == 0
        try:
            found = list(pairs(path.read_text(encoding="utf-8")))
        except (SyntaxError, UnicodeDecodeError):
            continue
        parts[held].extend(pair for pair in found if pair["prompt"] not in seen)
        seen.update(pair["prompt"] for pair in found)
    directory.mkdir(parents=True, exist_ok=True)
    files = directory / "pairs.jsonl", directory / "held_out.jsonl"
    for file, part in zip(files, parts, strict=True):
        file.write_text("".join(json.dumps(pair) + "\n" for pair in part))
    return files


def ltt(*words: str) -> str:
    """What a command prints."""
    command = [sys.executable, "-m", "llm_training_toolkit", *words]
    print("ltt", *words, flush=True)
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def held_out_losses(run: Path) -> list[float]:
    """At step 0, which is the model before it was tuned, and at the end."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["eval/loss"] for row in rows if "eval/loss" in row]


def answers(run: Path, file: Path) -> dict[str, Any]:
    """How held-out questions are answered, beside the docstring that was wanted and that of another function."""
    from llm_training_toolkit.evaluation.infill import compute_edit_similarity
    from llm_training_toolkit.generation.generator import TextGenerator
    from llm_training_toolkit.models.sampling import SamplingParams

    asked = [json.loads(line) for line in file.read_text().splitlines()]
    asked = sorted(asked, key=lambda pair: hashlib.sha256(pair["prompt"].encode()).hexdigest())[:ASKED]
    generator = TextGenerator.from_directory(run / "export")
    written = [generator.start_chat().send_message(pair["prompt"], SamplingParams(max_new_tokens=40)) for pair in asked]
    wanted = [pair["completion"] for pair in asked]
    given = [each.text for each in written]
    return {
        "asked": len(asked),
        "ended": fmean(each.ended for each in written),
        "exact": fmean(a == b for a, b in zip(wanted, given, strict=True)),
        "similarity": fmean(map(compute_edit_similarity, wanted, given)),
        "similarity_to_another": fmean(map(compute_edit_similarity, [*wanted[1:], wanted[0]], given)),
        "different_answers": len(set(given)),
        "examples": [
            {"asked": pair["prompt"], "wanted": pair["completion"], "answered": text}
            for pair, text in list(zip(asked, given, strict=True))[:SHOWN]
        ],
    }


def main() -> None:
    """Train, export, ask and measure; write chat.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "fim")
    runs = parser.parse_args().runs.absolute()
    base, run = runs / "with_1", runs / "chat"
    trained_on, held_out = write_pairs(runs / "pairs")
    fields = {
        "run.dir": runs,
        "model.init_from": base,
        "tokenizer.path": base / "export",
        "data.sources.0.path": trained_on,
        "data.eval.sources.0.path": held_out,
    }
    ltt("train", str(HERE / "chat.yaml"), *(f"{name}={value}" for name, value in fields.items()))
    before, *_, after = held_out_losses(run)
    ltt("export", str(run), "--out", str(run / "again"))
    question = json.loads(held_out.read_text().partition("\n")[0])["prompt"]
    shown = json.loads(ltt("generate", str(run), "--chat", "--prompt", question, "--json"))
    measured = json.loads(ltt("evaluate", str(run), "--task", "perplexity", "--json"))
    code = {
        name: json.loads(ltt("evaluate", str(path), "--task", "perplexity", "--data", str(ROOT / "src"), "--json"))
        for name, path in {"before": base, "after": run}.items()
    }
    result = {
        "pairs": len(trained_on.read_text().splitlines()),
        "held_out_pairs": len(held_out.read_text().splitlines()),
        "loss_before": before,
        "loss_after": after,
        "loss_evaluated": measured["loss"],
        "generated": shown["written"],
        "loss_of_code": {name: each["loss"] for name, each in code.items()},
        **answers(run, held_out),
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
