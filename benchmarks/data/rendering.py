"""Documents to tokens on disk, beside the bare encoder of the tokenizers library on the same documents, in turns.

    python rendering.py ROUNDS

The documents are Python's standard library, in memory; both take them in the same batches. The encoder's ids are read
as lists, and that is all. The toolkit cuts the documents into sequences of 2,048 tokens, says which tokens bear loss,
and writes them. Prints what it measured as JSON.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from llm_training_toolkit.config.source_config import SourceConfig
from llm_training_toolkit.data.prepare.arrow_store import SourceExample, write_examples
from llm_training_toolkit.data.prepare.renderer import DocumentRenderer
from llm_training_toolkit.data.sources import Document, read_source_documents
from llm_training_toolkit.data.tokenizer import TokenizationSpec, open_tokenizer, train_tokenizer
from llm_training_toolkit.families import find_size

MARKERS = TokenizationSpec.from_family(find_size("qwen2.5-coder-0.5b").family)
VOCABULARY = 8192
LENGTH = 2048
BATCH = 256
"""Documents at a time, as `ltt prepare` takes them."""
SOURCES = [
    SourceConfig.model_validate({"path": "python:stdlib", "format": "code", "fim": fim})
    for fim in (None, {"rate": 0.5})
]
Numbered = list[tuple[int, Document]]


def batches(read: Numbered) -> Iterator[Numbered]:
    """The documents in batches."""
    return (read[start : start + BATCH] for start in range(0, len(read), BATCH))


def encode(bare: Any, read: Numbered) -> int:
    """The encoder alone; how many tokens it finds."""
    found = 0
    for batch in batches(read):
        texts = [document.text for _, document in batch]
        found += sum(len(encoding.ids) for encoding in bare.encode_batch_fast(texts, add_special_tokens=False))
    return found


def render(renderer: DocumentRenderer, source: int, read: Numbered, target: Path) -> None:
    """Render by the rules of a source, and write."""
    target.mkdir()
    rendered = (
        each
        for batch in batches(read)
        for each in renderer.render_documents(source, batch, seed=0, epoch=0, plain=False)
    )
    write_examples(target, (SourceExample(source, example) for each in rendered for example in each.examples))


def seconds(work: Callable[..., object], *given: object) -> float:
    """How long something takes."""
    start = time.perf_counter()
    work(*given)
    return time.perf_counter() - start


def main() -> None:
    """Measure and print."""
    read = list(enumerate(read_source_documents(SOURCES[0], 0)))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train_tokenizer((document.text for _, document in read), VOCABULARY, MARKERS, folder)
        renderer = DocumentRenderer(SOURCES, MARKERS, open_tokenizer(name), folder, LENGTH)
        bare = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokens = encode(bare, read)
        for source in range(len(SOURCES)):  # what is loaded once does not count
            render(renderer, source, read[:BATCH], folder / f"first{source}")
        found: dict[str, list[float]] = {"tokenizers, the encoder alone": [], "plain": [], "half of it rearranged": []}
        for number in range(int(sys.argv[1])):
            raw, plain, moved = found.values()
            raw.append(seconds(encode, bare, read))
            plain.append(seconds(render, renderer, 0, read, folder / f"plain{number}"))
            moved.append(seconds(render, renderer, 1, read, folder / f"moved{number}"))
    print(json.dumps({"documents": len(read), "tokens": tokens, "seconds": found}), flush=True)


if __name__ == "__main__":
    main()
