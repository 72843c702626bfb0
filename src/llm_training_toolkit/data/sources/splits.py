"""Choice of the files of a split and of a subset, by the names that data sets have."""

from __future__ import annotations

import difflib
import posixpath
import re
from collections.abc import Sequence

from llm_training_toolkit.config.source_config import SourceConfig
from llm_training_toolkit.config.uri import redact_uri
from llm_training_toolkit.data.sources.files import SourceFile
from llm_training_toolkit.errors import DataError

USUAL_SPLITS = ("train", "test", "validation")
_ALIASES = {"validation": ("validation", "valid", "val", "dev")}
# Names that the datasets library writes: SPLIT-00000-of-00002.parquet, formerly with a hash behind it.
_SHARD_NAME = re.compile(r"(?P<split>[\w.-]*\w)-\d{5}-of-\d{5}(-[0-9a-f]+)?")


def select_split_files(found: Sequence[SourceFile], source: SourceConfig) -> list[SourceFile]:
    """Return the files of the source's subset and split, all of them without either.

    Raises DataError with the names that there are if none is left.
    """
    files = list(found)
    if source.subset is not None:
        files = [file for file in files if source.subset in file.name.split("/")[:-1]]
        if not files:
            folders = {folder for file in found for folder in file.name.split("/")[:-1]}
            raise build_choice_error(redact_uri(source.path), "subset", source.subset, sorted(folders))
    if source.split is not None:
        of_subset, split = files, source.split
        files = [file for file in of_subset if is_of_split(file.name, split)]
        if not files:
            raise build_choice_error(
                redact_uri(source.path), "split", split, find_splits([file.name for file in of_subset])
            )
    return files


def is_of_split(name: str, split: str) -> bool:
    """Return whether a file belongs to a split: by the shard's name, or a word of the file's or a directory's name."""
    if match := _SHARD_NAME.fullmatch(_get_stem(name)):
        return match["split"] == split
    words = "|".join(map(re.escape, _ALIASES.get(split, (split,))))
    where = f"{posixpath.dirname(name)}/{_get_stem(name)}"
    return re.search(rf"(?<![A-Za-z0-9])({words})(?![A-Za-z0-9])", where, re.IGNORECASE) is not None


def find_splits(names: Sequence[str]) -> list[str]:
    """Return the splits that the files belong to, by shard names and usual words."""
    shards = {match["split"] for name in names if (match := _SHARD_NAME.fullmatch(_get_stem(name)))}
    usual = {split for split in USUAL_SPLITS if any(is_of_split(name, split) for name in names)}
    return sorted(shards | usual)


def build_choice_error(path: str, key: str, wanted: str, known: Sequence[str]) -> DataError:
    """Build the error for a subset or split that does not exist, with the nearest that does."""
    near = difflib.get_close_matches(wanted, known, n=1)
    meant = f" Did you mean {key}: {near[0]}?" if near else ""
    there = f"There are: {', '.join(known[:20])}." if known else f"No file's name shows a {key}: remove it."
    return DataError(f"data.sources: {path!r} has no {key} {wanted!r}.{meant} {there}")


def _get_stem(name: str) -> str:
    """Return the file's name without its suffixes: `train-00000-of-00001` of `data/train-00000-of-00001.parquet`."""
    return posixpath.basename(name).partition(".")[0]
