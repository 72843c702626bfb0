"""How each family writes repositories, paths and stars: what the model reads, as a person reads it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from llm_training_toolkit.config.source_config import SourceConfig
from llm_training_toolkit.data.code.render import render_code
from llm_training_toolkit.data.code.repo_format import get_star_bucket
from llm_training_toolkit.data.code.rules import RenderRules
from llm_training_toolkit.data.sources import Document, RepositoryFile
from llm_training_toolkit.data.tokenizer import TextEncoder, TokenizationSpec, open_tokenizer, train_tokenizer
from llm_training_toolkit.errors import DataError
from llm_training_toolkit.families import find_size

FILE = Document(0, "a.jsonl:1", "x = 1\n", "me/app", "src/a.py", 42)
PARTS = (RepositoryFile("a.py", "x = 1\n"), RepositoryFile("b/c.py", "y = 2\n"), RepositoryFile("z.py", "z = 3"))
REPOSITORY = Document(0, "me/app", "".join(part.text for part in PARTS), "me/app", "", 42, PARTS)


@dataclass(frozen=True)
class Written:
    """A family's markers and a small tokenizer that has them."""

    markers: TokenizationSpec
    encoder: TextEncoder
    path: Path

    def text(self, document: Document, *, length: int = 256, **source: Any) -> str:
        """The one example of a document as text; its ids are those of the text read with its special tokens."""
        (example,) = self.examples(document, length, **source)
        text = self.encoder.decode(example)
        if source.get("fim", {}).get("spm_rate") != 1.0:  # there the prefix ends where nobody sees it
            everyone = tokenizers.Tokenizer.from_file(str(self.path / "tokenizer.json"))
            assert everyone.encode(text, add_special_tokens=False).ids == example
        return text

    def examples(self, document: Document, length: int, *, seed: int = 0, **source: Any) -> list[list[int]]:
        """The ids of every example of a document."""
        config = SourceConfig.model_validate({"path": "x", "format": "code", **source})
        rules = RenderRules.from_config(config, self.markers, self.encoder, length, seed=seed, epoch=0)
        return [example.tokens.tolist() for example in render_code([(0, document)], rules, self.encoder)[0].examples]


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Written]:
    found = {}
    for name in ("starcoderbase-1b", "starcoder2-3b", "qwen2.5-coder-0.5b", "qwen3-0.6b", "qwen2-0.5b"):
        markers, path = TokenizationSpec.from_family(find_size(name).family), tmp_path_factory.mktemp(name)
        train_tokenizer(["x = 1\n me/app src/a.py\n"] * 4, 300, markers, path)
        found[name] = Written(markers, open_tokenizer(str(path)), path)
    return found


FILES = {
    "starcoderbase-1b": "<reponame>me/app<filename>src/a.py<gh_stars>10-100\nx = 1\n<|endoftext|>",
    "starcoder2-3b": "<repo_name>me/app<file_sep>src/a.py\nx = 1\n<|endoftext|>",
    "qwen2.5-coder-0.5b": "<|repo_name|>me/app\n<|file_sep|>src/a.py\nx = 1\n<|endoftext|>",
    "qwen3-0.6b": "<|repo_name|>me/app\n<|file_sep|>src/a.py\nx = 1\n<|endoftext|>",
}
REPOSITORIES = {
    "starcoderbase-1b": "<reponame>me/app<filename>a.py<gh_stars>10-100\nx = 1\n<filename>b/c.py\ny = 2\n"
    "<filename>z.py\nz = 3<|endoftext|>",
    "starcoder2-3b": "<repo_name>me/app<file_sep>a.py\nx = 1\n<file_sep>b/c.py\ny = 2\n"
    "<file_sep>z.py\nz = 3<|endoftext|>",
    "qwen2.5-coder-0.5b": "<|repo_name|>me/app\n<|file_sep|>a.py\nx = 1\n\n<|file_sep|>b/c.py\ny = 2\n\n"
    "<|file_sep|>z.py\nz = 3<|endoftext|>",
}
WITHOUT_METADATA = {
    "starcoder2-3b": "<file_sep>x = 1\n<file_sep>y = 2\n<file_sep>z = 3<|endoftext|>",
    "qwen2.5-coder-0.5b": "<|file_sep|>x = 1\n\n<|file_sep|>y = 2\n\n<|file_sep|>z = 3<|endoftext|>",
}


@pytest.mark.parametrize("family", FILES)
def test_a_file_with_its_metadata(families: dict[str, Written], family: str) -> None:
    assert families[family].text(FILE, metadata=True) == FILES[family]
    assert families[family].text(FILE) == "x = 1\n<|endoftext|>"


@pytest.mark.parametrize("family", REPOSITORIES)
def test_a_whole_repository(families: dict[str, Written], family: str) -> None:
    assert families[family].text(REPOSITORY, metadata=True, group_by="repository") == REPOSITORIES[family]


@pytest.mark.parametrize("family", WITHOUT_METADATA)
def test_a_repository_without_metadata(families: dict[str, Written], family: str) -> None:
    assert families[family].text(REPOSITORY, group_by="repository") == WITHOUT_METADATA[family]


PARTLY_KNOWN = [
    ("starcoderbase-1b", Document(0, "n", "code", path="p"), "<filename>p\ncode<|endoftext|>"),
    ("starcoderbase-1b", Document(0, "n", "code", "r"), "<reponame>r\ncode<|endoftext|>"),
    ("starcoderbase-1b", Document(0, "n", "code", stars=0), "<gh_stars>0\ncode<|endoftext|>"),
    ("starcoderbase-1b", Document(0, "n", "code"), "code<|endoftext|>"),
    ("starcoder2-3b", Document(0, "n", "code", path="p", stars=3), "<file_sep>p\ncode<|endoftext|>"),
    ("starcoder2-3b", Document(0, "n", "code", "r"), "<repo_name>r<file_sep>code<|endoftext|>"),
    ("qwen3-0.6b", Document(0, "n", "code"), "<|file_sep|>code<|endoftext|>"),
]


@pytest.mark.parametrize(("family", "document", "expected"), PARTLY_KNOWN)
def test_what_is_not_known_is_left_out(
    families: dict[str, Written], family: str, document: Document, expected: str
) -> None:
    assert families[family].text(document, metadata=True) == expected


def test_stars_come_in_steps() -> None:
    steps = {
        0: "0",
        1: "1-10",
        10: "1-10",
        11: "10-100",
        100: "10-100",
        101: "100-1000",
        1000: "100-1000",
        1001: "1000+",
    }
    assert {stars: get_star_bucket(stars) for stars in steps} == steps


def test_marker_text_in_names_and_code_stays_text(families: dict[str, Written]) -> None:
    sly = Document(0, "n", "s = '<file_sep>'", "<repo_name>", "<fim_middle>.py")
    written = families["starcoder2-3b"]
    (example,) = written.examples(sly, 256, metadata=True)
    special = {written.encoder.get_special_token_id(marker) for marker in written.markers.tokens.all}
    assert [written.encoder.decode([i]) for i in example if i in special] == [
        "<repo_name>",
        "<file_sep>",
        "<|endoftext|>",
    ]


# All files rearranged: the cuts are "x =| 1|\n", "y| |= 2\n" and "z =| 3|".
REARRANGED = [
    (
        "starcoderbase-1b",
        0.0,
        "<reponame>me/app<filename>a.py<gh_stars>10-100\n<fim_prefix>x =<fim_suffix>\n<fim_middle> 1"
        "<filename>b/c.py\n<fim_prefix>y<fim_suffix>= 2\n<fim_middle> "
        "<filename>z.py\n<fim_prefix>z =<fim_suffix><fim_middle> 3<|endoftext|>",
    ),
    (
        "starcoder2-3b",
        0.0,
        "<repo_name>me/app<file_sep><fim_prefix>a.py\nx =<fim_suffix>\n<fim_middle> 1"
        "<file_sep><fim_prefix>b/c.py\ny<fim_suffix>= 2\n<fim_middle> "
        "<file_sep><fim_prefix>z.py\nz =<fim_suffix><fim_middle> 3<|endoftext|>",
    ),
    (
        "starcoder2-3b",
        1.0,
        "<repo_name>me/app<file_sep><fim_prefix><fim_suffix>\n<fim_middle>a.py\nx = 1"
        "<file_sep><fim_prefix><fim_suffix>= 2\n<fim_middle>b/c.py\ny "
        "<file_sep><fim_prefix><fim_suffix><fim_middle>z.py\nz = 3<|endoftext|>",
    ),
    (
        "qwen2.5-coder-0.5b",
        0.0,
        "<|repo_name|>me/app\n<|file_sep|>a.py\n<|fim_prefix|>x =<|fim_suffix|>\n<|fim_middle|> 1"
        "<|file_sep|>b/c.py\n<|fim_prefix|>y<|fim_suffix|>= 2\n<|fim_middle|> "
        "<|file_sep|>z.py\n<|fim_prefix|>z =<|fim_suffix|><|fim_middle|> 3<|endoftext|>",
    ),
    (
        "qwen2.5-coder-0.5b",
        1.0,
        "<|repo_name|>me/app\n<|file_sep|>a.py\n<|fim_prefix|><|fim_suffix|>\n<|fim_middle|>x = 1"
        "<|file_sep|>b/c.py\n<|fim_prefix|><|fim_suffix|>= 2\n<|fim_middle|>y "
        "<|file_sep|>z.py\n<|fim_prefix|><|fim_suffix|><|fim_middle|>z = 3<|endoftext|>",
    ),
]


@pytest.mark.parametrize(("family", "spm_rate", "expected"), REARRANGED)
def test_metadata_stays_in_front_of_what_is_rearranged(
    families: dict[str, Written], family: str, spm_rate: float, expected: str
) -> None:
    fim = {"rate": 1.0, "spm_rate": spm_rate}
    assert families[family].text(REPOSITORY, metadata=True, group_by="repository", fim=fim, seed=7) == expected


def test_a_family_without_the_tokens_is_refused(families: dict[str, Written]) -> None:
    with pytest.raises(DataError, match="no special tokens for repositories"):
        families["qwen2-0.5b"].text(FILE, metadata=True)
    with pytest.raises(DataError, match="files without metadata"):
        families["starcoderbase-1b"].text(REPOSITORY, group_by="repository")
