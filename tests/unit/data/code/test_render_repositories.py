"""Documents of several files, and fill-in-the-middle in each of them: at the level of chunks and of documents."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_training_toolkit.data.code.fim import FimRules
from llm_training_toolkit.data.code.render import render_code
from llm_training_toolkit.data.code.repo_format import RepoFormat
from llm_training_toolkit.data.code.rules import RenderRules
from llm_training_toolkit.data.sources import Document, RepositoryFile
from llm_training_toolkit.data.tokenizer import TextEncoder, open_tokenizer, train_tokenizer
from llm_training_toolkit.data.types import Example
from llm_training_toolkit.families import FAMILIES
from tiny_tokenizer import CODE, MARKERS

END, PREFIX, MIDDLE, SUFFIX, REPOSITORY, FILE = 0, 1, 2, 3, 5, 6
SPECIAL = {PREFIX, MIDDLE, SUFFIX, REPOSITORY, FILE}
STARCODER2 = RepoFormat(FILE, REPOSITORY, None, FAMILIES["starcoder2"].code_layout, metadata=True)
QWEN = replace(STARCODER2, form=FAMILIES["qwen3"].code_layout)
LAYOUTS = {"starcoder2": STARCODER2, "qwen": QWEN}
ALWAYS = FimRules(PREFIX, MIDDLE, SUFFIX, rate=1.0, spm_rate=0.5, middle_only=False)

words = st.text(alphabet="ab é漢😀\n(", min_size=1, max_size=60)
paths = st.text(alphabet="ab/é.", min_size=1, max_size=8)
repositories = st.lists(st.tuples(paths, words), min_size=1, max_size=4)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> TextEncoder:
    path = tmp_path_factory.mktemp("tokenizer")
    tokens = replace(MARKERS.tokens, all=(*MARKERS.tokens.all, "<repo_name>", "<file_sep>"))
    train_tokenizer([CODE] * 4, 302, replace(MARKERS, tokens=tokens), path)
    return open_tokenizer(str(path))


def document(files: list[tuple[str, str]], name: str = "me/app") -> Document:
    parts = tuple(RepositoryFile(path, text) for path, text in files)
    return Document(0, name, "".join(part.text for part in parts), name, "", None, parts)


def rules(layout: str, length: int, *, whole: bool, seed: int = 0, **fim: Any) -> RenderRules:
    chosen = replace(ALWAYS, whole=whole, path_in_prefix=LAYOUTS[layout].form.path_in_prefix, **fim)
    return RenderRules(length, END, fim=chosen, seed=seed, layout=LAYOUTS[layout])


def examples(files: list[tuple[str, str]], by: RenderRules, encoder: TextEncoder, number: int = 0) -> list[Example]:
    return render_code([(number, document(files))], by, encoder)[0].examples


class Read(NamedTuple):
    """A document read back: its repository, its files with metadata, and whether each one's end was rearranged."""

    repository: str
    files: list[str]
    moved: list[bool]


def read(pieces: list[list[int]], encoder: TextEncoder) -> Read:
    """What a reader of the tokens makes of them. A piece is what is read in one go: an example, or a whole document."""
    found: list[list[str]] = [[]]
    moved = [False]
    for piece in pieces:
        stretches: list[list[int]] = [[]]
        for token in piece:
            if token == FILE:
                stretches.append([])
            stretches[-1].append(token)
        for stretch in stretches:
            if stretch[:1] == [FILE]:
                found.append([])
                moved.append(False)
            tokens = [token for token in stretch if token not in {FILE, REPOSITORY, END}]
            if not tokens:
                continue
            moved[-1] = MIDDLE in tokens
            if moved[-1]:
                a, b, c = (tokens.index(marker) for marker in (PREFIX, SUFFIX, MIDDLE))
                tokens = [*tokens[:a], *tokens[a + 1 : b], *tokens[c + 1 :], *tokens[b + 1 : c]]
            found[-1].append(encoder.decode(tokens))
    texts = ["".join(each) for each in found]
    return Read(texts[0], texts[1:], moved[1:])


def expected(files: list[tuple[str, str]], layout: RepoFormat, moved: list[bool]) -> list[str]:
    tails = [layout.form.between_files] * (len(files) - 1) + [""]
    return [
        f"{path}\n{text}" + ("" if is_moved else tail)
        for (path, text), tail, is_moved in zip(files, tails, moved, strict=True)
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
@given(files=repositories, length=st.integers(16, 64), seed=st.integers(0, 50), rate=st.sampled_from([0.0, 0.5, 1.0]))
def test_chunk_by_chunk_no_character_is_lost(
    encoder: TextEncoder, layout: str, files: list[tuple[str, str]], length: int, seed: int, rate: float
) -> None:
    shown = examples(files, rules(layout, length, whole=False, seed=seed, rate=rate), encoder)
    back = read([example.tokens.tolist() for example in shown], encoder)
    assert back.repository == "me/app" + LAYOUTS[layout].form.after_repository
    assert back.files == expected(files, LAYOUTS[layout], back.moved)
    assert all(2 <= len(example.tokens) <= length for example in shown)
    assert shown[-1].tokens[-1] == END


@pytest.mark.parametrize("layout", LAYOUTS)
@given(files=repositories, length=st.integers(16, 64), seed=st.integers(0, 50), rate=st.sampled_from([0.5, 1.0]))
def test_document_by_document_no_character_is_lost(
    encoder: TextEncoder, layout: str, files: list[tuple[str, str]], length: int, seed: int, rate: float
) -> None:
    shown = examples(files, rules(layout, length, whole=True, seed=seed, rate=rate), encoder)
    whole = [token for example in shown for token in example.tokens.tolist()]
    back = read([whole], encoder)
    assert back.files == expected(files, LAYOUTS[layout], back.moved)
    counts = Counter(whole)
    assert counts[END] == 1
    assert counts[PREFIX] == counts[SUFFIX] == counts[MIDDLE] == sum(back.moved)
    assert counts[FILE] == len(files)
    assert all(2 <= len(example.tokens) <= length for example in shown)
    if len(shown) > 1 and rate == 1.0:
        assert all(back.moved)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@given(files=repositories, length=st.integers(96, 128), seed=st.integers(0, 50))
def test_no_piece_ends_with_a_marker_that_begins_nothing(
    encoder: TextEncoder, layout: str, whole: bool, files: list[tuple[str, str]], length: int, seed: int
) -> None:
    shown = examples(files, rules(layout, length, whole=whole, seed=seed, rate=0.5), encoder)
    assert not [example for example in shown if int(example.tokens[-1]) in SPECIAL]
    # Nor with a path, whose code would stand in another piece.
    for example in shown:
        for start in np.flatnonzero(example.tokens == FILE):
            after = example.tokens[start + 1 :].tolist()
            assert "\n" in encoder.decode(after) or after[:2] == [PREFIX, SUFFIX]  # there the suffix comes first


@pytest.mark.parametrize("layout", LAYOUTS)
def test_levels_agree_where_a_document_fits(encoder: TextEncoder, layout: str) -> None:
    files = [("a.py", "first\n"), ("b.py", "second\n")]
    for seed in range(20):
        by_chunk, by_document = (
            examples(files, rules(layout, 256, whole=w, seed=seed), encoder) for w in (False, True)
        )
        assert by_chunk[0].tokens.tolist() == by_document[0].tokens.tolist()


def places(length: int, *, whole: bool, encoder: TextEncoder) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    """(repositories, files): 0 plain, 1 prefix first, 2 suffix first."""
    by = rules("starcoder2", length, whole=whole, seed=3, rate=0.5, spm_rate=0.25)
    files = [("a", "first + second"), ("b", "return first"), ("c", "class Größe")]
    found = []
    for rendered in render_code([(i, document(files)) for i in range(1500)], by, encoder):
        tokens = [token for example in rendered.examples for token in example.tokens.tolist()]
        starts = [at for at, token in enumerate(tokens) if token == FILE]
        kinds = [(tokens[at + 1] == PREFIX) + (tokens[at + 1 : at + 3] == [PREFIX, SUFFIX]) for at in starts]
        found.append(kinds)
    return np.array(found)


@pytest.mark.parametrize(("length", "whole"), [(256, False), (16, True)])
def test_every_file_has_its_own_chance_at_both_levels(encoder: TextEncoder, length: int, whole: bool) -> None:
    kinds = places(length, whole=whole, encoder=encoder)
    assert kinds.shape == (1500, 3)
    expect = 1500 * np.array([0.5, 0.375, 0.125])
    for file in range(3):
        observed = np.bincount(kinds[:, file], minlength=3)
        assert ((observed - expect) ** 2 / expect).sum() < 13.8  # chi-square, 2 degrees of freedom, p = 0.001
    pairs = np.histogram2d(kinds[:, 0] > 0, kinds[:, 1] > 0, bins=2)[0]
    assert ((pairs - 375) ** 2 / 375).sum() < 16.3  # 3 degrees of freedom, p = 0.001


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("length", [256, 24])
def test_loss_on_the_middle_is_on_each_middle_and_what_ends_it(encoder: TextEncoder, layout: str, length: int) -> None:
    files = [(f"{name}.py", CODE[:30]) for name in "abcd"]
    seen = Counter[bool]()
    for number in range(20):
        by = rules(layout, length, whole=length < 64, seed=1, rate=0.5, spm_rate=0.0, middle_only=True)
        shown = examples(files, by, encoder, number)
        tokens = [token for example in shown for token in example.tokens.tolist()]
        loss = [bears for example in shown for bears in example.loss.tolist()]
        starts = [*(at for at, token in enumerate(tokens) if token == FILE), len(tokens) - 1]
        for start, stop in pairwise(starts):
            inside = tokens[start + 1 : stop]
            is_moved = MIDDLE in inside
            seen[is_moved] += 1
            without = inside.index(MIDDLE) + 1 if is_moved else 0
            assert loss[start + 1 : stop] == [False] * without + [True] * (len(inside) - without)
            following = tokens[stop + 1 : next((at for at in starts if at > stop), stop)]
            assert loss[stop] is (is_moved or MIDDLE not in following)
    assert min(seen.values()) > 10


def test_many_small_files_leave_room_to_be_rearranged(encoder: TextEncoder) -> None:
    files = [(f"{i}.py", f"value_{i} = first\n") for i in range(40)]
    shown = examples(files, rules("starcoder2", 128, whole=False), encoder)
    assert len(shown) > 5
    assert sum(read([e.tokens.tolist()], encoder).moved.count(True) for e in shown) == 40
