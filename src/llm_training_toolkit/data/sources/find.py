"""From a source of the configuration to its files, in an order that never changes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from llm_training_toolkit.config.schema import Source
from llm_training_toolkit.config.uri import is_address
from llm_training_toolkit.data.sources import local, remote
from llm_training_toolkit.data.sources.files import SourceFile, of_directory, searched
from llm_training_toolkit.errors import DataError


def files(source: Source) -> list[SourceFile]:
    """The files of a source, sorted by name. Raises DataError when there are none.

    A file named by its path or matched by a glob is taken whatever its suffix. A directory is searched for what the
    format reads (`kinds.of_directory`), without hidden files, `node_modules`, installed packages and virtual
    environments. Both hold for addresses, too.
    """
    try:
        found = sorted(_find(source), key=lambda file: file.name)
    except OSError as error:
        raise DataError(
            f"data.sources: {error.filename or source.path} cannot be listed ({error.strerror or error}). Make it "
            "readable, or name the files to read by a glob."
        ) from error
    if not found:
        where, advice = (
            f"looked from {Path.cwd()}; ",
            "Correct the path; a relative one counts from the working directory.",
        )
        if is_address(source.path):
            where, advice = "", remote.hint(source.path)
        raise DataError(
            f"data.sources: {source.path!r} matches no file ({where}a directory is searched for "
            f"{searched(source.format)}). {advice}"
        )
    return found


def fingerprint(sources: Iterable[Source]) -> str:
    """Hex sha256 over relative name, size, modification time and repository of every file; no content is read.

    Where a store has no modification times, the tag it gives a version stands for it. Raises DataError for a path that
    matches nothing.
    """
    digest = hashlib.sha256()
    for source in sources:
        digest.update(b"\0source")
        for file in files(source):
            # A checkout that appears or goes changes which repository a file of code belongs to, and no file.
            repository = file.repository if source.format == "code" else ""
            digest.update(f"\0{file.name}\0{_version(file)}\0{repository}".encode())
    return digest.hexdigest()


def _version(file: SourceFile) -> str:
    try:
        return file.version
    except OSError as error:
        raise DataError(
            f"{file.address}: cannot be looked at ({error.strerror or error}). Let nothing write into the sources, and "
            "prepare again."
        ) from error


def _find(source: Source) -> Iterable[SourceFile]:
    if source.path == local.STANDARD_LIBRARY:
        return local.standard_library()
    if is_address(source.path) and not source.path.startswith("file://"):
        found, is_directory = remote.find(source.path)
        return of_directory(found, source.format) if is_directory else found
    path = Path(source.path.removeprefix("file://")).expanduser()
    return of_directory(local.directory(path), source.format) if path.is_dir() else local.others(path)
