"""Documents that the search for near-duplicates takes per second, and its memory, in one process or with Ray's.

`python benchmarks/data/near_duplicates.py 100000` prints a line at each fifth, which shows how both grow. With
`--cluster` a Ray cluster computes the signatures: that of RAY_ADDRESS, else one of this machine's CPUs. The process
that decides also makes the documents: `decision_cpu_seconds` is its processor time without that.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import time
from collections.abc import Iterator

from llm_training_toolkit.data.prepare.min_hash import Signature, get_band_rows, sign_in_process
from llm_training_toolkit.data.prepare.near_duplicates import NearDuplicateIndex
from llm_training_toolkit.data.types import Document

THRESHOLD = 0.8
WORDS, LINES, WORDS_PER_LINE = 20_000, 60, 6


class DocumentMaker:
    """Makes documents, and counts the processor time that this takes."""

    def __init__(self, count: int) -> None:
        self.rng, self.count, self.cpu_seconds = random.Random(1), count, 0.0
        letters = "abcdefghijklmnopqrstuvwxyz_"
        self.words = ["".join(self.rng.choices(letters, k=self.rng.randint(2, 10))) for _ in range(WORDS)]

    def iter_documents(self) -> Iterator[Document]:
        """Yield texts of 60 lines, 3.2 kB; two of them share hardly a shingle."""
        for number in range(self.count):
            begun = time.process_time()
            lines = (" ".join(self.rng.choices(self.words, k=WORDS_PER_LINE)) for _ in range(LINES))
            text = "\n".join(f"{line} = {self.rng.choice(self.words)}()" for line in lines)
            self.cpu_seconds += time.process_time() - begun
            yield Document(0, str(number), text)


def sign(documents: Iterator[Document], *, cluster: bool) -> Iterator[tuple[Document, Signature | None]]:
    """Yield documents with signatures, computed here or on the cluster."""
    rows = get_band_rows(THRESHOLD)
    if not cluster:
        return sign_in_process(documents, rows)
    from llm_training_toolkit.launch.backend import prepare_environment

    prepare_environment()
    from llm_training_toolkit.launch.ray.data_prep import sign_on_cluster
    from llm_training_toolkit.monitoring.console import Console

    return sign_on_cluster(documents, rows, Console())


def main() -> None:
    """Add the documents, and print rates and peak."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("documents", type=int)
    parser.add_argument("--cluster", action="store_true")
    arguments = parser.parse_args()
    maker = DocumentMaker(arguments.documents)
    characters = dropped = 0
    first = begun = 0.0
    with NearDuplicateIndex(THRESHOLD) as index:
        for number, (document, signature) in enumerate(sign(maker.iter_documents(), cluster=arguments.cluster), 1):
            if number == 1:  # the start of a cluster is no part of the rate
                first, begun = time.perf_counter(), time.process_time() - maker.cpu_seconds
            characters += len(document.text)
            dropped += not index.add_document(signature)
            if number % max(arguments.documents // 5, 1) == 0:
                seconds, cpu = time.perf_counter() - first, time.process_time() - maker.cpu_seconds - begun
                facts = {
                    "documents": number,
                    "mean_characters": characters / number,
                    "dropped": dropped,
                    "seconds": seconds,
                    "documents_per_second": number / seconds,
                    "decision_cpu_seconds": cpu,
                    "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
                }
                print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
