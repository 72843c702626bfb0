"""The documents: every link leads somewhere, and every command a reader is told to type exists."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest
import typer

from llm_training_toolkit.cli.app import app

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "PROJECT_STRUCTURE.md", "SECURITY.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
MAX_SENTENCE_WORDS = 35
MAX_CELL_WORDS = 25
_FENCED = re.compile(r"^( *)(```+|~~~+)([^\n]*)\n(.*?)^ *\2", re.DOTALL | re.MULTILINE)
_LINK = re.compile(
    r"\]\(<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\)|^\[[^\]]+\]:\s+(\S+)|(?:src|href)=\"([^\"]+)\"", re.MULTILINE
)
_COMMAND = re.compile(r"(?:^|&&|;|\||--|\$)\s*(?:\S*/)?(ltt|make)\s+([a-z][a-z-]*)")


def links(text: str) -> Iterator[str]:
    """Targets of links into the repository."""
    for groups in _LINK.findall(re.sub(r"`[^`\n]+`", "", _FENCED.sub("", text))):
        target = "".join(groups)
        if not re.match(r"[a-z]+:|//|#", target):
            yield unquote(target.split("#")[0].split("?")[0])


def commands(text: str) -> Iterator[tuple[str, str]]:
    """(program, verb or target) in the fenced blocks, comments left out."""
    for _, _, _, block in _FENCED.findall(text):
        for line in block.splitlines():
            yield from _COMMAND.findall(re.sub(r"(^|\s)#.*", "", line).strip())


def cells(text: str) -> Iterator[str]:
    """Cells of tables, markup removed."""
    for line in _FENCED.sub("", text).splitlines():
        if line.lstrip().startswith("|") and not re.fullmatch(r"[\s|:-]+", line):
            yield from (plain(cell) for cell in re.split(r"(?<!\\)\|", line.strip().strip("|")))


def sentences(text: str) -> Iterator[str]:
    """Sentences of paragraphs and list items: no code blocks, no tables, no headings."""
    prose = re.sub(r"^\s*(\||#).*$", "", _FENCED.sub("", text), flags=re.MULTILINE)
    for block in re.split(r"\n\s*\n|^\s*(?:[-*]|\d+\.)\s", prose, flags=re.MULTILINE):
        yield from re.split(r"(?<=[.!?:;])\s+", plain(block))


def plain(markdown: str) -> str:
    """Text as it is read: a span of code is one word, a link is its text."""
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", re.sub(r"`[^`]+`", "code", markdown))
    return " ".join(re.sub(r"[*_<>]", "", text).split())


def verbs() -> set[str]:
    return set(getattr(typer.main.get_command(app), "commands", {}))


def targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_into_the_repository_leads_to_something(document: Path) -> None:
    if not document.exists():
        pytest.skip("not written yet")
    broken = [
        link
        for link in links(document.read_text())
        if not (ROOT / link[1:] if link.startswith("/") else document.parent / link).exists()
    ]
    assert broken == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_sentence_is_long_and_no_cell_is_a_paragraph(document: Path) -> None:
    text = document.read_text()
    assert [sentence for sentence in sentences(text) if len(sentence.split()) > MAX_SENTENCE_WORDS] == []
    assert [cell for cell in cells(text) if len(cell.split()) > MAX_CELL_WORDS] == []


def test_words_are_counted_as_a_reader_counts_them() -> None:
    text = (
        "# A title\n\nOne `a b c` [two](x.md). Three\nfour: five.\n\n- six\n- seven\n\n| a b | `c d` e |\n|---|---|\n"
    )
    assert list(sentences(text)) == ["", "One code two.", "Three four:", "five.", "", "six", "seven", ""]
    assert list(cells(text)) == ["a b", "code e"]


def test_every_command_in_the_readme_exists() -> None:
    known = {"ltt": verbs(), "make": targets()}
    unknown = {f"{program} {verb}" for program, verb in commands((ROOT / "README.md").read_text())} - {
        f"{program} {verb}" for program, names in known.items() for verb in names
    }
    assert unknown == set()


def test_verbs_and_targets_are_found_where_they_are_defined() -> None:
    assert verbs() >= {"plan", "prepare", "train", "generate"}
    assert targets() >= {"quickstart", "test", "check"}
    assert "PYTHON" not in targets()


SAMPLE = """
See [the code](src/a.py#L3), [the web](https://example.org), [here](#links) and ![a picture](docs/a%20b.png "title").
`[not a link](nowhere)` <img src="x.svg">

```bash
make quickstart   # make sure, ltt dance
$ .venv/bin/ltt train configs/a.yaml train.steps=5 && ltt runs
ray job submit --working-dir . -- ltt submit configs/a.yaml
ltt --help
```

```python
make = [ltt](broken)
```

[later]: docs/later.md
"""


def test_links_and_commands_are_told_from_what_only_looks_like_them() -> None:
    assert list(links(SAMPLE)) == ["src/a.py", "docs/a b.png", "x.svg", "docs/later.md"]
    assert list(commands(SAMPLE)) == [("make", "quickstart"), ("ltt", "train"), ("ltt", "runs"), ("ltt", "submit")]


@pytest.mark.parametrize(
    ("name", "least"), [("SECURITY.md", 20), ("docs/failures.md", 25), ("docs/drill.md", 7), ("docs/promises.md", 40)]
)
def test_every_promise_names_a_test_or_target_that_is_there(name: str, least: int) -> None:
    """The last column of tables headed `test`."""
    tables = re.findall(r"^\|.*\| tests? \|\n\|[-|]+\|\n((?:\|.*\n)+)", (ROOT / name).read_text(), re.MULTILINE)
    rows = [line.strip("|").split("|")[-1] for table in tables for line in table.splitlines()]
    named = [[*re.findall(r"`([^`]+)`", row)] for row in rows]
    there = {path.name for path in (ROOT / "tests").rglob("test_*.py")} | {f"make {target}" for target in targets()}
    paths = {each for row in named for each in row} - there
    assert len(named) >= least
    assert all(named)
    assert [each for each in paths if not any((folder / each).exists() for folder in (ROOT, ROOT / "tests"))] == []


def test_the_workflow_has_no_rights_and_no_action_that_can_move() -> None:
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert re.search(r"^permissions:\n  contents: read\n", workflow, re.MULTILINE)
    actions = re.findall(r"uses: (\S+)", workflow)
    assert actions
    assert all(re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", action) for action in actions)
