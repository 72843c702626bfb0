"""Prints the package as it is: every file with the first line of its docstring, and figures of its layout.

`make structure` writes the list; `make structure FIGURES=--figures` the figures that docs/contributing.md states.
"""

from __future__ import annotations

import argparse
import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "llm_training_toolkit"
# Files a reader opens for one step, one restart and one trial, in the order they are called.
WALKS = {
    "step": """train/loop.py train/hooks.py train/components.py train/loss_spikes.py train/stragglers.py
        data/dataloader.py data/dataset.py engine/engine.py models/loss.py""",
    "restart": """launch/ray/controller.py launch/ray/worker_group.py launch/ray/train_fn.py launch/ray/control_actor.py
        launch/ray/hang_detector.py launch/ray/failure_policy.py launch/ray/resources.py
        launch/ray/capacity.py worker/main.py checkpoint/restore.py""",
    "trial": """launch/tune/tuner.py launch/tune/trainable.py launch/tune/callbacks.py search/space.py search/sampler.py
        search/early_stopping.py search/event_log.py search/budget.py launch/ray/controller.py train/hooks.py
        search/outputs.py""",
}
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def main() -> None:
    """Print what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--figures", action="store_true", help="the figures alone")
    if parser.parse_args().figures:
        print("\n".join(figures()))
    else:
        print("\n".join(files()))


def files() -> Iterator[str]:
    """Yield the folders with their files, each with what its docstring says first."""
    for folder in sorted({path.parent for path in PACKAGE.rglob("*.py")}):
        yield f"\n{folder.relative_to(PACKAGE.parent)}/"
        for path in sorted(folder.glob("*.py")):
            yield f"  {path.name:24} {first_line(path)}"


def first_line(path: Path) -> str:
    """Return the first line of a file's docstring."""
    return (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]


def figures() -> Iterator[str]:
    """Yield the figures of the layout."""
    paths = sorted(PACKAGE.rglob("*.py"))
    folders = Counter(path.parent for path in paths)
    largest, count = folders.most_common(1)[0]
    names = [name for path in paths for name in definitions(path)]
    single = sum(is_one_word(name) for name in names)
    yield f"files                      {len(paths)}"
    yield f"lines                      {sum(map(count_lines, paths))}"
    yield f"largest folder             {count} files, {largest.relative_to(PACKAGE)}/"
    yield f"files at the root          {folders[PACKAGE]}"
    longest = max(paths, key=count_lines)
    yield f"longest file               {count_lines(longest)} lines, {longest.relative_to(PACKAGE)}"
    yield f"files in import cycles     {len(find_cyclic_modules(paths))}, lazy imports counted"
    yield f"names of one word          {single / len(names):.0%} of {len(names)} functions, methods and classes"
    for walk, listed in WALKS.items():
        missing = [name for name in listed.split() if not (PACKAGE / name).is_file()]
        assert not missing, f"WALKS[{walk!r}] names files that are gone: {missing}"
        yield f"files to read for a {walk:7} {len(listed.split())}"


def count_lines(path: Path) -> int:
    """Return the lines of a file."""
    return path.read_text().count("\n")


def find_cyclic_modules(paths: list[Path]) -> set[str]:
    """Return the modules in import cycles, or between two of them; `__init__.py` files only pass names on."""
    graph = {get_module(path): set(list_imports(path)) for path in paths if path.name != "__init__.py"}
    while graph:
        imported = set().union(*graph.values())
        rest = {name: each & graph.keys() for name, each in graph.items() if name in imported and each & graph.keys()}
        if rest == graph:
            break
        graph = rest
    return set(graph)


def get_module(path: Path) -> str:
    """Return the dotted name of a file's module."""
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)


def list_imports(path: Path) -> Iterator[str]:
    """Yield the modules of the package that a file imports anywhere, and the names it takes from them."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def definitions(path: Path) -> Iterator[str]:
    """Yield the names of a file's functions, methods and classes, special methods left out."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, Definition) and not node.name.startswith("__"):
            yield node.name


def is_one_word(name: str) -> bool:
    """Return whether a name has neither an inner underscore nor a second capital."""
    word = name.strip("_")
    return "_" not in word and not any(letter.isupper() for letter in word[1:])


if __name__ == "__main__":
    main()
