"""Sources: from a path or an address of the configuration to documents, in an order that never changes."""

from llm_training_toolkit.config.address import is_address
from llm_training_toolkit.data.sources.document import Document, Part, Tally, check_skipped, content_hash
from llm_training_toolkit.data.sources.finding import files, fingerprint
from llm_training_toolkit.data.sources.local import STANDARD_LIBRARY
from llm_training_toolkit.data.sources.place import SourceFile
from llm_training_toolkit.data.sources.reading import documents, hashes, with_doubles

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
