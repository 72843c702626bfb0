"""The toolkit's packing: documents cut into chunks by their lengths, packed, and the plan written to disk.

python packing.py DOCUMENTS
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from lengths import LENGTH, Integers, Pieces, chunks_of, lengths_of, report
from llm_training_toolkit.data.prepare.packing import PackingPlan, pack_examples


def packed(lengths: Integers) -> tuple[float, Integers, Integers, PackingPlan]:
    """Seconds, document and length of every chunk, and the plan."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        document, chunks = chunks_of(lengths)
        plan = pack_examples(chunks, LENGTH, targets=chunks - 1)
        plan.write(Path(folder))
        return time.perf_counter() - start, document, chunks, plan


def main() -> None:
    """Pack and report."""
    packed(lengths_of(100))  # what is loaded once does not count
    documents = int(sys.argv[1])
    seconds, document, chunks, plan = packed(lengths_of(documents))
    rows = np.repeat(np.arange(len(plan)), np.diff(plan.offsets))
    report(seconds, documents, Pieces(document[plan.order], rows, chunks[plan.order]))


if __name__ == "__main__":
    main()
