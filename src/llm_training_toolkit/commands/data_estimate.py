"""Length of an epoch by the bytes of its files, before anything is prepared."""

from __future__ import annotations

from pathlib import Path

from llm_training_toolkit.config import Config
from llm_training_toolkit.config.source_config import SourceConfig
from llm_training_toolkit.config.uri import is_uri
from llm_training_toolkit.data.sources.files import get_compression_suffix
from llm_training_toolkit.data.sources.find import list_source_files
from llm_training_toolkit.data.sources.local import STANDARD_LIBRARY
from llm_training_toolkit.errors import DataError
from llm_training_toolkit.plan import DataFacts, StreamFacts

BYTES_PER_TOKEN = 3.5  # an assumption: code and prose with vocabularies of 49,000 to 152,000 have 3 to 4.5
_COLUMNAR = ".parquet"


def estimate_data_facts(config: Config) -> DataFacts | None:
    """Return the sequences of an epoch by the bytes of the sources' files.

    None for a run over steps or tokens, which has no need of it, and where bytes say little or take long to learn:
    addresses, data sets on the hub, git histories, compressed files.
    """
    if config.train.epochs is None:
        return None
    sizes = [_sum_file_sizes(source) for source in config.data.sources]
    total = sum(size for size in sizes if size is not None)
    if None in sizes or not total:
        return None
    sequences = max(round(total / BYTES_PER_TOKEN / config.data.sequence_length), 1)
    return DataFacts((StreamFacts((sequences,)),), estimated=True)


def format_estimate_note(facts: DataFacts, config: Config) -> str:
    """Say how the length was estimated."""
    tokens = facts.streams[0].sequences_per_part[0] * config.data.sequence_length
    return (
        f"train.epochs: about {tokens:,} tokens an epoch, by the bytes of the files at {BYTES_PER_TOKEN} a token. "
        "ltt prepare counts them."
    )


def _sum_file_sizes(source: SourceConfig) -> int | None:
    """Return the bytes of a source, or None if they are not known here."""
    if source.format == "git" or is_uri(source.path):
        return None
    if source.path != STANDARD_LIBRARY and not _is_on_this_disk(source.path):
        return None
    try:
        files = list_source_files(source)
        if any(get_compression_suffix(file.name) or file.name.endswith(_COLUMNAR) for file in files):
            return None
        return sum(Path(file.filesystem_path).stat().st_size for file in files)
    except (DataError, OSError):
        return None  # `prepare` and `train` say what is wrong


def _is_on_this_disk(path: str) -> bool:
    """Return whether a path or the directory of a glob exists; an owner/name that does not is on the hub."""
    before_wildcard = path.split("*", 1)[0].split("?", 1)[0].split("[", 1)[0]
    start = Path(before_wildcard).expanduser()
    return start.exists() if before_wildcard == path else start.parent.exists()
