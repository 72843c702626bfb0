"""Data sets of the Hugging Face hub by id, such as `tatsu-lab/alpaca`: record files in the hub's cache."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from textwrap import shorten
from typing import Any

from fsspec.utils import glob_translate  # type: ignore[import-untyped]
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from llm_training_toolkit.data.sources.files import (
    CODE_SUFFIXES,
    RECORD_FILE_FORMATS,
    SourceFile,
    SourceRoot,
    get_content_suffix,
    has_wildcards,
)
from llm_training_toolkit.data.sources.remote import get_access_hint, translate_remote_errors
from llm_training_toolkit.data.sources.splits import build_choice_error, find_splits, is_of_split
from llm_training_toolkit.errors import DataError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
_RECORD_SUFFIXES = frozenset({*RECORD_FILE_FORMATS, ".json"})
_FRONT_MATTER = re.compile(r"---\s*\n(.*?)\n---\s*(\n|$)", re.DOTALL)
_MAX_CAUSE_LENGTH = 300
_REQUEST_SECONDS = 10.0


def is_hub_id(path: str) -> bool:
    """Return whether a path that does not exist here has the form of a hub id: `owner/name` or `owner/name@revision`.

    A name with the suffix of a data or source file is taken for a path.
    """
    if _HUB_ID.fullmatch(path) is None or has_wildcards(path):
        return False
    suffix = get_content_suffix(path.partition("@")[0])
    return suffix not in _RECORD_SUFFIXES | CODE_SUFFIXES | {".txt"} and not Path(path).exists()


def find_hub_files(path: str, subset: str | None, split: str | None) -> list[SourceFile]:
    """Return the record files of a data set on the hub, downloaded, of its chosen subset and split.

    `path` is `owner/name`, or `owner/name@revision`. The revision is resolved once per process. Without a network, or
    in the hub's offline mode, its cache is read. Raises DataError if the data set is missing or unreachable, or needs a
    login or another subset and split.
    """
    return list(_find_hub_files(path, subset, split, constants.ENDPOINT, constants.HF_HUB_CACHE))


@lru_cache(maxsize=64)
def _find_hub_files(
    path: str, subset: str | None, split: str | None, _endpoint: str, _cache: str
) -> tuple[SourceFile, ...]:
    name, _, revision = path.partition("@")
    listed, unreachable = _list_hub_files(path, name, revision)
    # By its name, not by its commit: the cache then knows which commit it is, and answers without a network.
    directory = _download(path, name, revision, ["README.md"], unreachable)
    files = listed or [file.relative_to(directory).as_posix() for file in directory.rglob("*") if file.is_file()]
    readme = directory / "README.md"
    subsets = _read_subsets(readme.read_text(encoding="utf-8", errors="replace")) if readme.is_file() else []
    chosen = _choose_files(path, files, subsets, (subset, split))
    directory = _download(path, name, directory.name, chosen, unreachable)
    root = SourceRoot(str(directory), name.partition("/")[2])
    return tuple(SourceFile(root, each, stamp=_build_stamp(directory / each)) for each in sorted(chosen))


def _list_hub_files(path: str, name: str, revision: str) -> tuple[list[str], str]:
    """Return the files of a revision and "", or an empty list and the reason if the hub is unreachable.

    Raises DataError if the hub has no such data set or revision.
    """
    try:
        with translate_remote_errors(f"hf://datasets/{path}"):
            info = HfApi().dataset_info(name, revision=revision or None, timeout=_REQUEST_SECONDS)
    except DataError as error:
        cause = error.__cause__ or error
        if isinstance(cause, GatedRepoError | RepositoryNotFoundError | RevisionNotFoundError):
            raise _explain(path, cause, "") from error
        return [], shorten(str(cause), _MAX_CAUSE_LENGTH) or type(cause).__name__
    return [sibling.rfilename for sibling in info.siblings or ()], ""


def _download(path: str, name: str, revision: str, files: Sequence[str], unreachable: str) -> Path:
    """Return the snapshot directory with some files, only from the cache if the hub is `unreachable`."""
    try:
        with translate_remote_errors(f"hf://datasets/{path}"):
            found: str = snapshot_download(
                name,
                repo_type="dataset",
                revision=revision or None,
                allow_patterns=list(files),
                local_files_only=bool(unreachable),
            )
    except DataError as error:
        raise _explain(path, error.__cause__ or error, unreachable) from error
    return Path(found)


def _explain(path: str, error: BaseException, unreachable: str) -> DataError:
    """Build the error for a data set that the hub did not give."""
    name = path.partition("@")[0]
    match error:
        case GatedRepoError():
            why = "is gated: accept its conditions"
            advice = f"Visit {constants.ENDPOINT}/datasets/{name}, then set HF_TOKEN, or `hf auth login`."
        case RevisionNotFoundError():
            why, advice = f"has no revision {path.partition('@')[2]!r}", "Correct what is behind the @, or remove it."
        case RepositoryNotFoundError():
            why = f"is no path here (from {Path.cwd()}), and the hub shows no data set of this name"
            advice = "Correct it; for a private one set HF_TOKEN, or `hf auth login`."
        case LocalEntryNotFoundError() if constants.HF_HUB_OFFLINE:
            why = f"is no path here (from {Path.cwd()}), is not in the hub's cache, and offline mode is on"
            advice = (
                f"Unset HF_HUB_OFFLINE, or fetch it where there is a network: hf download --repo-type dataset {name}"
            )
        case LocalEntryNotFoundError():
            why = f"is no path here (from {Path.cwd()}), and the hub at {constants.ENDPOINT} cannot be reached"
            advice = (
                f"({unreachable or shorten(str(error), _MAX_CAUSE_LENGTH)}). Correct the path, or check the network."
            )
        case _:
            why, advice = f"cannot be read ({shorten(str(error), _MAX_CAUSE_LENGTH)})", get_access_hint("hf://")
    return DataError(f"data.sources: {path!r} {why}. {advice}")


def _build_stamp(file: Path) -> str:
    """Return size and hash of a downloaded file: the cache names its contents by their hash."""
    return f"{file.stat().st_size}\0{file.resolve().name}"


@dataclass(frozen=True)
class _HubSubset:
    """Subset of a README's `configs`: patterns of files by split; all in one nameless split if it names none."""

    name: str
    is_default: bool
    patterns: Mapping[str, tuple[str, ...]]


def _read_subsets(readme: str) -> list[_HubSubset]:
    """Return the subsets that the README's metadata defines, if any."""
    # Imported here, because data is also prepared where ruamel.yaml is absent (plain CUDA images).
    from ruamel.yaml import YAML  # noqa: PLC0415
    from ruamel.yaml.error import YAMLError  # noqa: PLC0415

    from llm_training_toolkit.config.yaml_reader import check_yaml_limits  # noqa: PLC0415

    match = _FRONT_MATTER.match(readme)
    try:
        check_yaml_limits(match[1] if match else "")
        metadata = YAML(typ="safe", pure=True).load(match[1]) if match else None
    except YAMLError:
        return []
    found = metadata.get("configs") if isinstance(metadata, dict) else None
    configs = [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []
    subsets = (
        _HubSubset(str(each.get("config_name", "default")), bool(each.get("default")), _read_patterns(each))
        for each in configs
    )
    return [subset for subset in subsets if subset.patterns]


def _read_patterns(config: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    files = config.get("data_files")
    if isinstance(files, list) and all(isinstance(each, dict) for each in files):
        return {str(each.get("split", "train")): _as_texts(each.get("path")) for each in files}
    return {"": patterns} if (patterns := _as_texts(files)) else {}


def _as_texts(value: object) -> tuple[str, ...]:
    return tuple(map(str, value)) if isinstance(value, list) else (value,) if isinstance(value, str) else ()


def _choose_files(
    path: str, files: Sequence[str], subsets: Sequence[_HubSubset], choice: tuple[str | None, str | None]
) -> list[str]:
    """Return the record files of the chosen (subset, split). Raises DataError if a choice is needed or impossible."""
    subset, split = choice
    records = [name for name in files if get_content_suffix(name) in _RECORD_SUFFIXES and not _is_hidden(name)]
    if not records:
        kinds = sorted({get_content_suffix(name) or name for name in files})
        raise DataError(
            f"data.sources: {path!r} on the hub has no {', '.join(sorted(_RECORD_SUFFIXES))} files (it has "
            f"{', '.join(kinds[:12]) or 'none'}). Convert it, or choose its revision @refs/convert/parquet."
        )
    if not subsets:
        by_split = _split_by_name(path, records, subset)
    else:
        patterns = _choose_subset(path, subsets, subset).patterns
        by_split = {name: _match(each, records) for name, each in patterns.items()}
        if list(by_split) == [""]:
            by_split = _split_by_name(path, by_split[""], None)
    return _choose_split(path, by_split, split)


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _choose_subset(path: str, subsets: Sequence[_HubSubset], wanted: str | None) -> _HubSubset:
    names = [subset.name for subset in subsets]
    if wanted is not None:
        if wanted not in names:
            raise build_choice_error(path, "subset", wanted, names)
        return subsets[names.index(wanted)]
    usual = [subset for subset in subsets if subset.is_default or subset.name == "default"]
    if len(subsets) > 1 and not usual:
        raise DataError(
            f"data.sources: {path!r} has the subsets {', '.join(names[:20])}: say which one, as in subset: {names[0]}"
        )
    return (usual or subsets)[0]


def _split_by_name(path: str, records: Sequence[str], subset: str | None) -> dict[str, list[str]]:
    """Return the files by split, as their names show it; under an empty name if they show none."""
    inside = [name for name in records if subset is None or subset in name.split("/")[:-1]]
    if subset is not None and not inside:
        folders = {folder for name in records for folder in name.split("/")[:-1]}
        raise build_choice_error(path, "subset", subset, sorted(folders))
    splits = find_splits(inside)
    return {split: [name for name in inside if is_of_split(name, split)] for split in splits} or {"": inside}


def _choose_split(path: str, by_split: Mapping[str, list[str]], wanted: str | None) -> list[str]:
    if wanted is not None and wanted not in by_split:
        raise build_choice_error(path, "split", wanted, [split for split in by_split if split])
    if wanted is None and len(by_split) > 1:
        first = "train" if "train" in by_split else next(iter(by_split))
        raise DataError(
            f"data.sources: {path!r} has the splits {', '.join(by_split)}: say which one, as in split: {first}"
        )
    chosen = by_split[next(iter(by_split)) if wanted is None else wanted]
    if not chosen:
        raise DataError(
            f"data.sources: {path!r}: the README's patterns match none of the data set's record files. Give its files "
            "by an address: hf://datasets/owner/name/pattern"
        )
    return chosen


def _match(patterns: Iterable[str], files: Sequence[str]) -> list[str]:
    matchers = [re.compile(glob_translate(pattern.removeprefix("./"))) for pattern in patterns]
    return [name for name in files if any(matcher.fullmatch(name) for matcher in matchers)]
