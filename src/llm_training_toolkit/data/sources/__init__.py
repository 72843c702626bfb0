"""Sources: from a path or an address of the configuration to documents, in an order that never changes."""

from llm_training_toolkit.config.uri import is_address
from llm_training_toolkit.data.sources.document import Tally, check_skipped
from llm_training_toolkit.data.sources.files import SourceFile
from llm_training_toolkit.data.sources.find import files, fingerprint
from llm_training_toolkit.data.sources.local import STANDARD_LIBRARY
from llm_training_toolkit.data.sources.read import documents, hashes, with_doubles
from llm_training_toolkit.data.types import Document, Part, content_hash

__all__ = [
    "STANDARD_LIBRARY",
    "Document",
    "Part",
    "SourceFile",
    "Tally",
    "check_skipped",
    "content_hash",
    "documents",
    "files",
    "fingerprint",
    "hashes",
    "is_address",
    "with_doubles",
]
