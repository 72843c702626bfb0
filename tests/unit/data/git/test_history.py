"""Histories as documents: each byte of a change comes back from its tokens, people and the future stay out."""

from __future__ import annotations

import os
import stat
import subprocess
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from git_histories import History, day
from layout_tokens import decode_source, render_source
from llm_training_toolkit.config.schema import Config
from llm_training_toolkit.config.source_config import SourceConfig
from llm_training_toolkit.data.git.edits import CURSOR, REGION_END, REGION_START
from llm_training_toolkit.data.git.history import remove_people
from llm_training_toolkit.data.prepare.builder import DatasetBuilder, prepare_dataset
from llm_training_toolkit.data.prepare.document_index import DocumentIndex, DocumentReader, DocumentShard
from llm_training_toolkit.data.prepare.shards import render_in_process
from llm_training_toolkit.data.sources import Document, DocumentStats, read_source_documents
from llm_training_toolkit.data.tokenizer import TokenizationSpec, open_tokenizer
from llm_training_toolkit.errors import DataError
from llm_training_toolkit.families import find_size


def read(history: History, tally: DocumentStats | None = None, **fields: Any) -> list[Document]:
    source = SourceConfig.model_validate({"path": str(history.path), "format": "git", "layout": "diffs", **fields})
    return list(read_source_documents(source, 0, tally=tally))


def commit_of(document: Document) -> str:
    return document.name.partition("@")[2].partition(":")[0]


def list_commits(history: History) -> list[str]:
    return history.git("rev-list", "--reverse", "--topo-order", "--no-merges", "HEAD").split()


def parent_of(history: History, commit: str) -> str:
    parents = history.git("rev-list", "--parents", "-n1", commit).split()[1:]
    return parents[0] if parents else ""


def show(history: History, commit: str, path: str) -> str:
    """A file of a commit, empty where there is none."""
    if not commit:
        return ""
    raw = subprocess.run(
        ["git", "cat-file", "blob", f"{commit}:{path}"], cwd=history.path, capture_output=True, check=False
    )
    return raw.stdout.decode()


def test_history_has_thirty_commits(history: History) -> None:
    assert int(history.git("rev-list", "--count", "HEAD")) == 30


def test_diffs_give_back_every_tree(history: History, git_tokenizers: dict[str, Path], tmp_path: Path) -> None:
    """Each commit's decoded tokens, applied to its parent, make its tree, but for files that are no text."""
    written = decode_source(
        git_tokenizers["qwen2.5-coder-0.5b"], history.path, format="git", layout="diffs", length=1 << 20
    )
    documents = read(history)
    changed = [c for c in list_commits(history) if history.git("diff-tree", "--root", "-r", "--no-commit-id", c)]
    assert [commit_of(document) for document in documents] == changed
    for document, text in zip(documents, written, strict=True):
        commit, index = commit_of(document), tmp_path / f"index-{commit_of(document)}"
        parent = parent_of(history, commit)
        diff = text.removesuffix("<|endoftext|>")
        diff = diff[diff.index("diff --git") :]
        left = apply_to_tree(history, index, parent, diff)
        right = history.git("rev-parse", f"{commit}^{{tree}}")
        without = [] if left == right else history.git("diff-tree", "-r", "--name-only", left, right).split("\n")
        assert without in ([], ["c.bin", "d.py"])


def apply_to_tree(history: History, index: Path, parent: str, diff: str) -> str:
    def run(*arguments: str, stdin: str = "") -> str:
        environment = {"PATH": os.environ["PATH"], "GIT_INDEX_FILE": str(index)}
        command = ["git", "-c", "core.autocrlf=false", *arguments]
        done = subprocess.run(
            command, cwd=history.path, env=environment, check=True, capture_output=True, input=stdin.encode()
        )
        return done.stdout.decode().strip()

    run("read-tree", *([parent] if parent else ["--empty"]))
    run("apply", "--cached", "--whitespace=nowarn", "-", stdin=diff)
    return run("write-tree")


def test_commit_tokens_give_back_every_file(history: History, git_tokenizers: dict[str, Path]) -> None:
    tokenizer = git_tokenizers["starcoderbase-1b"]
    encoder = open_tokenizer(str(tokenizer))
    ends = [encoder.get_special_token_id(name) for name in ("<commit_before>", "<commit_msg>", "<commit_after>")]
    rendered = render_source(tokenizer, history.path, length=1 << 20, format="git", layout="commits")
    documents = read(history, layout="commits")
    assert len(documents) == len(rendered) > 25
    for document, each in zip(documents, rendered, strict=True):
        ids = each.examples[0].tokens.tolist()
        places = [ids.index(end) for end in ends]
        before, message, after = (
            encoder.decode(ids[start + 1 : stop])
            for start, stop in zip(places, [*places[1:], len(ids) - 1], strict=True)
        )
        commit = commit_of(document)
        parent = parent_of(history, commit)
        old_path = "e.py" if document.path == "f.py" and after else document.path
        assert after == show(history, commit, document.path)
        assert before in {show(history, parent, document.path), show(history, parent, old_path)}
        assert message == remove_people(history.git("log", "-1", "--format=%s", commit))


def test_edits_give_back_the_region_before_and_after(history: History, git_tokenizers: dict[str, Path]) -> None:
    documents = read(history, layout="edits")
    rendered = render_source(
        git_tokenizers["qwen2.5-coder-0.5b"], history.path, length=1 << 20, format="git", layout="edits"
    )
    encoder = open_tokenizer(str(git_tokenizers["qwen2.5-coder-0.5b"]))
    assert len(documents) == len(rendered) > 20
    by_file: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for document, each in zip(documents, rendered, strict=True):
        (example,) = each.examples
        trained = encoder.decode(example.tokens[example.loss])
        shown = encoder.decode(example.tokens[~example.loss])
        assert trained.startswith(f"{REGION_START}\n")
        assert trained.endswith(f"{REGION_END}\n<|endoftext|>")
        assert shown.startswith(f"{document.path}\n")
        assert shown.count(CURSOR) == 1
        before = shown.partition(f"{REGION_START}\n")[2].partition(REGION_END)[0].replace(CURSOR, "")
        after = trained.removeprefix(f"{REGION_START}\n").partition(REGION_END)[0]
        assert before != after
        by_file.setdefault((commit_of(document), document.path), []).append((before, after))
    for (commit, path), edits in by_file.items():
        text, at, made = show(history, parent_of(history, commit), "e.py" if path == "f.py" else path), 0, ""
        for before, after in edits:  # in the order of the file
            found = text.index(before, at)
            made, at = made + text[at:found] + after, found + len(before)
        assert made + text[at:] == show(history, commit, path)


def test_cursor_is_where_the_edit_begins(history: History) -> None:
    first = read(history, layout="edits")[0]
    assert first.text.startswith(f"a.py\n{REGION_START}\n{CURSOR}line 0\nline 1\n")


def test_what_is_left_out_is_counted(history: History) -> None:
    tally = DocumentStats()
    read(history, tally)
    assert tally.dropped == {"merge": 1, "binary": 1, "not_utf8": 1}


def test_merges_are_counted_up_to_a_limit(history: History) -> None:
    tally = DocumentStats()
    read(history, tally, limit=len(read(history)))
    assert tally.dropped["merge"] == 1


def test_people_are_left_out(history: History) -> None:
    for layout in ("diffs", "commits", "edits"):
        text = "\n".join(document.text for document in read(history, layout=layout))
        assert not [word for word in ("Ann", "Carl C", "example.org", "Signed-off", "Eve", "Reviewed") if word in text]
    assert remove_people("Stand-by: a\n\nWhy.\n\nFly-by: me\n") == "Stand-by: a\n\nWhy."
    assert not remove_people("\nSigned-off-by: Ann Author <ann@example.org>\n")
    assert remove_people("a\n\nWhy.\n\nCC: x\nHelped-by: me\n") == "a\n\nWhy."


def test_no_commit_after_the_date_is_in_training(history: History) -> None:
    limit = day(20)
    train, held = read(history, before=limit), read(history, after=limit)
    dates = {c: int(history.git("show", "-s", "--format=%ct", c)) for c in list_commits(history)}
    first_held = int(history.git("show", "-s", "--format=%ct", commit_of(held[0])))
    assert all(dates[commit_of(document)] < first_held for document in train)
    assert [commit_of(each) for each in (*train, *held)] == [commit_of(each) for each in read(history)]
    assert train
    assert held


def test_commit_with_an_old_date_on_top_of_newer_ones_is_of_the_future(tmp_path: Path) -> None:
    history = History(tmp_path / "app")
    history.commit("old", a__py=b"1\n")
    history.commit("new", a__py=b"2\n", date=day(10))
    skewed = history.commit("wrong clock", a__py=b"3\n", date=day(1))
    assert [commit_of(document) for document in read(history, after=day(5))][-1] == skewed
    assert len(read(history, before=day(5))) == 1


def test_order_is_the_same_again_and_a_shard_begins_anywhere(history: History, tmp_path: Path) -> None:
    names = [document.name for document in read(history)]
    assert names == [document.name for document in read(history)]
    config = build_config(history, tmp_path, "starcoderbase-1b", layout="commits")
    builder = build(config, "starcoderbase-1b")
    builder.build_parts([1])
    index = DocumentIndex.read(builder.directory / "documents")
    for start in (0, 17):
        found = DocumentReader(builder.data, index).read_documents(DocumentShard(0, start, start + 5), held=False)
        assert [document.name for _, document in found] == list(index.names[start : start + 5].to_pylist())


def build_config(history: History, runs: Path, model: str, **source: Any) -> Config:
    return Config.model_validate(
        {
            "run": {"name": "x", "dir": str(runs)},
            "model": {"name": model},
            "tokenizer": {"train": {"vocab_size": 512}},
            "data": {
                "sequence_length": 512,
                "sources": [{"path": str(history.path), "format": "git", **source}],
                "eval": {"fraction": 0.0},
            },
            "train": {"epochs": 1},
        }
    )


def build(config: Config, model: str) -> DatasetBuilder:
    return DatasetBuilder(config, TokenizationSpec.from_family(find_size(model).family), None, render_in_process)


@pytest.mark.parametrize(
    ("model", "layout"), [("starcoderbase-1b", "commits"), ("starcoder2-3b", "diffs"), ("qwen3-0.6b", "diffs")]
)
def test_layout_follows_from_the_tokens_of_the_family(
    history: History, tmp_path: Path, model: str, layout: str
) -> None:
    assert [source.layout for source in build(build_config(history, tmp_path, model), model).sources] == [layout]


def test_prepared_history_is_accounted_for(history: History, tmp_path: Path) -> None:
    config = build_config(history, tmp_path, "qwen3-0.6b", before=day(20))
    markers = TokenizationSpec.from_family(find_size("qwen3-0.6b").family)
    (source,) = prepare_dataset(config, markers).dataset_info.sources
    assert source.documents == len(read(history, before=day(20)))
    assert source.tokens == source.loss_tokens + source.documents  # an example's first token is no target


def test_large_files_are_left_out_and_take_no_memory(tmp_path: Path) -> None:
    history = History(tmp_path / "app")
    history.commit("large", a__py=b"x = 1\n" * 1000, b__py=b"y\n")
    tally = DocumentStats()
    (document,) = read(history, tally, max_document_mb=0.001)
    assert "b.py" in document.text
    assert "a.py" not in document.text
    assert tally.dropped.total() == 1


def test_commit_of_many_files_is_read_one_by_one(tmp_path: Path) -> None:
    history = History(tmp_path / "app")
    for number in range(12):
        history.write(f"{number}.py", f"x = {number}\n".encode() * 3000)
    history.commit("import")
    tracemalloc.start()
    assert len(list(read_lengths(history, layout="commits"))) == 12
    assert not list(read_lengths(history, layout="diffs", max_document_mb=0.1))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3 << 19  # all lines as Python strings have 2 MB and more


def read_lengths(history: History, **fields: Any) -> Iterator[int]:
    source = SourceConfig.model_validate({"path": str(history.path), "format": "git", **fields})
    return (len(document.text) for document in read_source_documents(source, 0))


def test_programs_that_a_repository_names_are_not_run(tmp_path: Path) -> None:
    """Text converters, external diffs, monitors, hooks and aliases of a stranger's .git/config."""
    trap, proof = tmp_path / "trap.sh", tmp_path / "proof"
    trap.write_text(f'#!/bin/sh\ntouch {proof}\ncat "$1" 2>/dev/null\n')
    trap.chmod(trap.stat().st_mode | stat.S_IXUSR)
    history = History(tmp_path / "app")
    history.commit("one", a__py=b"1\n", __gitattributes=b"*.py diff=evil filter=evil\n")
    history.commit("two", a__py=b"2\n")
    for key in (
        "diff.evil.textconv",
        "diff.evil.command",
        "diff.external",
        "filter.evil.clean",
        "filter.evil.smudge",
        "core.fsmonitor",
        "core.pager",
        "core.sshCommand",
        "core.alternateRefsCommand",
        "alias.diff-tree",
    ):
        history.git("config", key, str(trap))
    for hook in ("post-checkout", "reference-transaction", "pre-auto-gc"):
        (history.path / ".git" / "hooks").mkdir(exist_ok=True)
        (history.path / ".git" / "hooks" / hook).symlink_to(trap)
    assert len(read(history, layout="commits")) == 3
    assert len(read(history)) == 2
    assert not proof.exists()


def test_repository_that_cannot_be_read_stops_the_preparation(tmp_path: Path) -> None:
    history = History(tmp_path / "app")
    history.commit("one", a__py=b"1\n")
    blob = history.git("rev-parse", "HEAD:a.py")
    history.commit("two", a__py=b"2\n")
    (history.path / ".git" / "objects" / blob[:2] / blob[2:]).unlink()
    with pytest.raises(DataError, match="git fsck"):
        read(history)


@pytest.mark.parametrize("place", [".gitattributes", ".git/info/attributes"])
@pytest.mark.parametrize("attribute", ["-diff", "diff=python", "diff"])
def test_current_commit_alone_decides_the_documents(tmp_path: Path, place: str, attribute: str) -> None:
    """Attributes and configuration of a clone are in no key of a preparation."""
    history = History(tmp_path / "app")
    lines = [f"def f{number}():\n    return {number}\n" for number in range(20)]
    history.commit("one", a__py="".join(lines).encode(), b__py=b"x = 1\n" * 400)
    history.commit("two", a__py="".join([*lines[:-1], "    pass\n"]).encode())
    fields: dict[str, Any] = {"max_document_mb": 0.002}
    plain_tally, tally = DocumentStats(), DocumentStats()
    plain = read(history, plain_tally, **fields)
    (history.path / place).parent.mkdir(exist_ok=True)
    history.write(place, f"*.py {attribute}\n".encode())
    history.git("config", "diff.python.xfuncname", "^(.*)$")
    history.git("config", "diff.orderFile", "/dev/null")
    assert [each.text for each in read(history, tally, **fields)] == [each.text for each in plain]
    assert tally.dropped == plain_tally.dropped


def test_work_tree_reads_the_objects_of_its_repository(history: History, tmp_path: Path) -> None:
    history.git("worktree", "add", "-q", "--detach", str(tmp_path / "tree"))
    source = SourceConfig(path=str(tmp_path / "tree"), format="git", layout="diffs")
    assert [each.text for each in read_source_documents(source, 0)] == [each.text for each in read(history)]


def test_history_with_longer_ids_is_read(tmp_path: Path) -> None:
    path = tmp_path / "app"
    subprocess.run(["git", "init", "-q", "--object-format=sha256", str(path)], check=True, capture_output=True)
    history = History(path)
    history.commit("one", a__py=b"1\n")
    assert len(read(history)) == 1


@pytest.mark.parametrize("mark", ["end of commit", "diff --git y"])
def test_mark_within_a_long_line_is_none(tmp_path: Path, mark: str) -> None:
    """A line of more than the maximum comes in pieces, and a piece may look like the end of a commit."""
    history = History(tmp_path / "app")
    name = "x" * 20 + mark
    history.write(name, b"1\n")
    history.commit("long", z__py=b"z = 1\n")
    history.commit("next", z__py=b"z = 2\n")
    piece = f"diff --git a/{name} b/{name}".rindex(mark)
    tally = DocumentStats()
    documents = read(history, tally, layout="edits", max_document_mb=(piece - 1.5) / (1 << 20))
    assert not documents
    assert tally.dropped == {"too_large": 3}


@pytest.mark.parametrize(
    ("encoding", "message", "expected"),
    [
        ("latin-1", b"caf\xe9", "caf\u00e9"),
        ("undefined", b"a", "a"),
        ("idna", b"a", "a"),
        ("hex", b"a", "a"),
        ("utf-7", b"a +2AA- b", "a +2AA- b"),
        ("\u00fctf", b"a", "a"),
        ("none", b"a\xff", "a\ufffd"),
    ],
)
def test_message_is_text_whatever_encoding_its_commit_names(
    tmp_path: Path, encoding: str, message: bytes, expected: str
) -> None:
    history = History(tmp_path / "app")
    history.commit("one", a__py=b"1\n")
    head, _, _ = history.git("cat-file", "commit", "HEAD").partition("\n\n")
    raw = f"{head}\nencoding {encoding}\n\n".encode() + message
    history.git("update-ref", "HEAD", history.git("hash-object", "-t", "commit", "-w", "--stdin", stdin=raw))
    (document,) = read(history)
    assert document.text.startswith(f"{expected}\n\n")
    assert document.text.encode()
