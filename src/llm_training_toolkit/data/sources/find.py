"""File listing of a configured source, in a fixed order."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from llm_training_toolkit.config.source_config import SourceConfig
from llm_training_toolkit.config.uri import is_uri, redact_uri
from llm_training_toolkit.data.git.history import find_repository_file
from llm_training_toolkit.data.sources import local, remote
from llm_training_toolkit.data.sources.files import (
    FileFormat,
    SourceFile,
    detect_file_format,
    format_searched_suffixes,
    select_readable_files,
)
from llm_training_toolkit.data.sources.hub import find_hub_files, is_hub_id
from llm_training_toolkit.data.sources.splits import select_split_files
from llm_training_toolkit.errors import DataError


def list_source_files(source: SourceConfig) -> list[SourceFile]:
    """Return the files of a source, sorted by name. Raises DataError if there are none.

    A file named by path or matched by a glob may have any suffix. A directory is searched for the format's suffixes
    (`select_readable_files`), without hidden files, `node_modules`, installed packages and virtual environments.
    With `fields` or `filter` only record files are searched for. Both hold for addresses, too. `subset` and `split`
    choose among the files. A path `owner/name` that does not exist here is a data set on the hub (`find_hub_files`).
    """
    try:
        found = sorted(_find_source_files(source), key=lambda file: file.name)
    except OSError as error:
        where = error.filename or redact_uri(source.path)
        raise DataError(
            f"data.sources: {where} cannot be listed ({error.strerror or error}). Make it readable, or name the files "
            "to read by a glob."
        ) from error
    if not found:
        where, advice = (
            f"looked from {Path.cwd()}; ",
            "Correct the path; a relative one counts from the working directory.",
        )
        if is_uri(source.path):
            where, advice = "", remote.get_access_hint(source.path)
        elif not source.follow_symlinks:
            advice += " Symbolic links that lead out of it are read with follow_symlinks: true."
        raise DataError(
            f"data.sources: {redact_uri(source.path)!r} matches no file ({where}a directory is searched for "
            f"{format_searched_suffixes(source.format)}). {advice}"
        )
    return found


class SourceListing(NamedTuple):
    """Files of all sources: a hex sha256 of their list, and the bytes of each source as they are stored."""

    fingerprint: str
    sizes: tuple[int, ...]


def inspect_sources(sources: Iterable[SourceConfig]) -> SourceListing:
    """List the files of the sources without reading them.

    The fingerprint covers relative name, size, modification time and repository of every file. A store without
    modification times contributes its version tag instead, and one without sizes 0 bytes. Raises DataError for a path
    without files.
    """
    digest, sizes = hashlib.sha256(), []
    for source in sources:
        digest.update(b"\0source")
        total = 0
        for file in list_source_files(source):
            # Adding or removing a checkout changes the repository of code files, but not the files.
            repository = file.repository if source.format in {"code", "notebooks"} else ""
            stamp = _read_version_stamp(file)
            digest.update(f"\0{file.name}\0{stamp}\0{repository}".encode())
            size, *marks = stamp.split("\0")
            total += int(size) if marks and size.isdecimal() else 0
        sizes.append(total)
    return SourceListing(digest.hexdigest(), tuple(sizes))


def fingerprint_sources(sources: Iterable[SourceConfig]) -> str:
    """Return the fingerprint of `inspect_sources` alone."""
    return inspect_sources(sources).fingerprint


def _read_version_stamp(file: SourceFile) -> str:
    try:
        return file.version_stamp
    except OSError as error:
        raise DataError(
            f"{file.display_path}: cannot be looked at ({error.strerror or error}). Let nothing write into the "
            "sources, and "
            "prepare again."
        ) from error


def _find_source_files(source: SourceConfig) -> Iterable[SourceFile]:
    """Yield the files before their order is fixed. Of a data set on the hub, subset and split are chosen here."""
    if source.format == "git":
        return [find_repository_file(source)]
    if is_hub_id(source.path):
        return find_hub_files(source.path, source.subset, source.split)
    return select_split_files(list(_find_path_files(source)), source)


def _find_path_files(source: SourceConfig) -> Iterable[SourceFile]:
    if source.path == local.STANDARD_LIBRARY:
        return local.find_standard_library_files()
    if is_uri(source.path) and not source.path.startswith("file://"):
        stored, is_directory = remote.find_remote_files(source.path)
        return _select_readable_files(stored, source) if is_directory else stored
    path = Path(source.path.removeprefix("file://")).expanduser()
    if not path.is_dir() and path.exists():
        return local.find_matching_files(path)  # named by the user, whatever it links to
    found = local.find_directory_files(path) if path.is_dir() else local.find_matching_files(path)
    if not source.follow_symlinks:
        found = local.select_files_inside(found)
    return _select_readable_files(found, source) if path.is_dir() else found


def _select_readable_files(found: Iterable[SourceFile], source: SourceConfig) -> list[SourceFile]:
    files = select_readable_files(found, source.format)
    if source.fields is None and source.filter is None:
        return files
    return [file for file in files if detect_file_format(file.relative, source.format) is not FileFormat.WHOLE]
