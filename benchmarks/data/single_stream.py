"""Description of an index as one stream of one epoch, for benchmarks that read it without a run."""

from __future__ import annotations

from pathlib import Path

from llm_training_toolkit.data.prepare.dataset_info import DatasetInfo, EpochInfo, StreamInfo


def describe_single_stream(
    folder: Path, epoch: EpochInfo, *, sequence_length: int, vocab_size: int = 1, eval_sequences: int = 0
) -> DatasetInfo:
    """Describe the folders `tokens`, `plan` and `tokenizer` of an index; its held-out rows are those of training."""
    (folder / "tokenizer").mkdir(exist_ok=True)
    return DatasetInfo(
        fingerprint="",
        directory=str(folder),
        tokenizer_path=str(folder / "tokenizer"),
        vocab_size=vocab_size,
        pad_id=0,
        sequence_length=sequence_length,
        seed=0,
        sources=(),
        streams=(StreamInfo(1, (epoch,)),),
        held_out="tokens",
        held_out_plan="plan",
        eval_sequences=eval_sequences,
        padding=0.0,
        tokens_lost=0,
    )
