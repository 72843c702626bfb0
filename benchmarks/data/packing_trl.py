"""TRL's packing of the same documents, in memory.

    python packing_trl.py DOCUMENTS STRATEGY

Every token is the number of its document, so that what became of each is counted in the result.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import numpy as np
import pyarrow as pa

from lengths import LENGTH, lengths_of, pieces_of, report


def packed(documents: int, strategy: str) -> tuple[float, Any]:
    """Seconds, and the column of packed tokens."""
    from datasets import Dataset, disable_progress_bars
    from trl import pack_dataset

    disable_progress_bars()
    lengths = lengths_of(documents)
    tokens = pa.array(np.repeat(np.arange(documents, dtype=np.int32), lengths))
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]))
    dataset = Dataset(pa.table({"input_ids": pa.LargeListArray.from_arrays(offsets, tokens)}))
    start = time.perf_counter()
    done = pack_dataset(dataset, LENGTH, strategy)
    return time.perf_counter() - start, done.data.column("input_ids").combine_chunks()


def main() -> None:
    """Pack and report."""
    documents, strategy = int(sys.argv[1]), sys.argv[2]
    packed(100, strategy)  # what is loaded once does not count
    seconds, column = packed(documents, strategy)
    report(seconds, documents, pieces_of(column.values.to_numpy(), column.offsets.to_numpy()[:-1]))


if __name__ == "__main__":
    main()
