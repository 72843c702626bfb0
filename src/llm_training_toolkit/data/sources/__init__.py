"""Sources: documents from the paths and addresses of the configuration, in a fixed order."""

from llm_training_toolkit.config.uri import is_uri
from llm_training_toolkit.data.sources.document import DocumentStats, check_faults, format_faults, write_fault_report
from llm_training_toolkit.data.sources.files import SourceFile
from llm_training_toolkit.data.sources.find import fingerprint_sources, inspect_sources, list_source_files
from llm_training_toolkit.data.sources.local import STANDARD_LIBRARY
from llm_training_toolkit.data.sources.read import (
    iter_content_hashes,
    keep_duplicates,
    read_sample,
    read_source_documents,
)
from llm_training_toolkit.data.types import Document, RepositoryFile, content_hash

__all__ = [
    "STANDARD_LIBRARY",
    "Document",
    "DocumentStats",
    "RepositoryFile",
    "SourceFile",
    "check_faults",
    "content_hash",
    "fingerprint_sources",
    "format_faults",
    "inspect_sources",
    "is_uri",
    "iter_content_hashes",
    "keep_duplicates",
    "list_source_files",
    "read_sample",
    "read_source_documents",
    "write_fault_report",
]
