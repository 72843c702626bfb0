"""Documents that the index of near-duplicates takes per second of processor time, and its memory.

`python benchmarks/data/near_duplicates.py 100000` prints a line at each fifth, which shows how both grow.
"""

from __future__ import annotations

import json
import random
import resource
import sys
import time

from llm_training_toolkit.data.prepare.near_duplicates import NearDuplicateIndex

WORDS, LINES, WORDS_PER_LINE = 20_000, 60, 6


def draw_document(rng: random.Random, words: list[str]) -> str:
    """Draw a text of 60 lines, 3.2 kB; two of them share hardly a shingle."""
    lines = (" ".join(rng.choices(words, k=WORDS_PER_LINE)) for _ in range(LINES))
    return "\n".join(f"{line} = {rng.choice(words)}()" for line in lines)


def main(documents: int) -> None:
    """Add the documents, and print rate and peak."""
    rng = random.Random(1)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz_", k=rng.randint(2, 10))) for _ in range(WORDS)]
    seconds, characters, dropped = 0.0, 0, 0
    with NearDuplicateIndex(0.8) as index:
        for number in range(1, documents + 1):
            text = draw_document(rng, words)
            characters += len(text)
            begun = time.process_time()
            dropped += not index.add_document(text)
            seconds += time.process_time() - begun
            if number % max(documents // 5, 1) == 0:
                facts = {
                    "documents": number,
                    "mean_characters": characters / number,
                    "dropped": dropped,
                    "documents_per_cpu_second": number / seconds,
                    "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
                }
                print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
