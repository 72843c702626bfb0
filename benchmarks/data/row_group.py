"""Memory of reading a Parquet file that is one row group.

`python benchmarks/data/row_group.py make FILE` writes 200,000 texts of 10 kB, 2 GB; `… read FILE` reads them.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from llm_training_toolkit.config.source_config import SourceConfig
from llm_training_toolkit.data.sources import read_source_documents

CHUNKS, ROWS, BYTES = 100, 2000, 5 << 10
LOOK_EVERY = 500


def make(path: Path) -> None:
    """Write texts that differ, uncompressed."""
    texts = (pa.array([f"{chunk}:{row}:{os.urandom(BYTES).hex()}" for row in range(ROWS)]) for chunk in range(CHUNKS))
    table = pa.table({"text": pa.chunked_array(texts)})
    pq.write_table(
        table, path, row_group_size=CHUNKS * ROWS, write_batch_size=64, compression="none", use_dictionary=False
    )


def get_resident_mib(kind: str) -> float:
    """Return this process's memory: `RssAnon` its own, `RssFile` pages of mapped files, which the kernel may drop."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(kind))


def read(path: Path) -> None:
    """Read all documents, and print the largest memory seen."""
    before, own, mapped, arrow, documents = get_resident_mib("RssAnon"), 0.0, 0.0, 0, 0
    source = SourceConfig(path=str(path), format="text")
    for documents, _ in enumerate(read_source_documents(source, 0), start=1):
        if documents % LOOK_EVERY == 0:
            own = max(own, get_resident_mib("RssAnon") - before)
            mapped = max(mapped, get_resident_mib("RssFile"))
            arrow = max(arrow, pa.total_allocated_bytes())
    group = pq.ParquetFile(path).metadata.row_group(0)
    facts = {"documents": documents, "row_group_bytes": group.total_byte_size, "own_mib": own, "mapped_mib": mapped}
    print(json.dumps({**facts, "arrow_mib": arrow / (1 << 20)}), flush=True)


if __name__ == "__main__":
    {"make": make, "read": read}[sys.argv[1]](Path(sys.argv[2]))
