"""Tokenizer: training, loading, and encoding of documents with marker text kept as text."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from numpy.typing import NDArray
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from llm_training_toolkit.errors import DataError
from llm_training_toolkit.families import CodeLayout, Family, SpecialTokens

TOKENIZER_FILES = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
]
_BYTES = 256
LONG_TEXT = 1 << 20  # characters; longer texts are encoded in pieces
_CHARACTERS_PER_CALL = 1 << 20
_SEARCHED_CHARACTERS = 1 << 12
_LINE_START = re.compile(r"\S\n(?=\S)")
_SPACED_WORD = re.compile(r"\S(?= \S)")
Ids = NDArray[np.uint32]
Spans = NDArray[np.int64]


def train_tokenizer(texts: Iterable[str], vocab_size: int, markers: TokenizationSpec, path: Path) -> None:
    """Train a byte-level BPE tokenizer and write it as a directory that transformers' AutoTokenizer opens.

    `vocab_size` includes the special tokens, which get the first ids; texts with few distinct words may yield fewer.
    The same texts in the same order give the same files. Raises DataError for a `vocab_size` too small for the special
    tokens and the 256 bytes.
    """
    special = markers.tokens.all
    least = len(special) + _BYTES
    if vocab_size < least:
        raise DataError(
            f"tokenizer.train.vocab_size: {vocab_size} has no room for {len(special)} special tokens and 256 "
            f"bytes. Give at least {least}; thousands are usual."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(markers.pre_tokenizer_pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(marker, special=True, normalized=False) for marker in special],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    path.mkdir(parents=True, exist_ok=True)
    # Not `tokenizer.save`, which turns a full disk into an exception without a class or an errno.
    (path / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    config = json.dumps(_build_transformers_config(markers), indent=2, ensure_ascii=False)
    (path / "tokenizer_config.json").write_text(config + "\n", encoding="utf-8")


def _build_transformers_config(markers: TokenizationSpec) -> dict[str, Any]:
    named = {markers.tokens.end_of_text, markers.tokens.pad}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": markers.tokens.end_of_text,
        "pad_token": markers.tokens.pad,
        "additional_special_tokens": [marker for marker in markers.tokens.all if marker not in named],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1_000_000_000,
    }


def resolve_tokenizer_directory(path: str, revision: str | None = None) -> Path:
    """Return the directory of a tokenizer: the path itself, or the local copy of a hub id at a revision (None = main).

    Raises DataError if there is no tokenizer.json or if the hub download fails.
    """
    directory = Path(path).expanduser()
    if directory.is_dir():
        if not (directory / "tokenizer.json").is_file():
            raise DataError(
                f"tokenizer.path: the directory {path!r} has no tokenizer.json. Give the directory that holds it; a "
                "tokenizer of another kind is converted by transformers' `AutoTokenizer…save_pretrained`."
            )
        return directory
    # A local copy is used first: a run must not change because the hub did.
    reason = ""
    for local_only in (True, False):
        try:
            found = snapshot_download(
                path, revision=revision, allow_patterns=TOKENIZER_FILES, local_files_only=local_only
            )
            directory = Path(found)
        except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
            reason = str(error).strip().partition("\n")[0]
            continue
        if (directory / "tokenizer.json").is_file():
            return directory
        reason = "the repository has no tokenizer.json"
    raise DataError(
        f"tokenizer.path: {path!r} is no directory here, and the Hugging Face hub did not give it"
        f"{'' if revision is None else f' at revision {revision}'} ({reason}). Correct "
        "the path, or fetch the tokenizer where there is a network and give its directory."
    )


def open_tokenizer(path: str) -> TextEncoder:
    """Open the tokenizer of a directory or a hub id. Raises DataError with the fault and the remedy."""
    file = resolve_tokenizer_directory(path) / "tokenizer.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        # Some families declare markers as ordinary tokens (Qwen its fill-in-the-middle ones). Every added token is made
        # special here, so that a marker's text in a document stays text.
        for token in content.get("added_tokens", ()):
            token["special"] = True
        # from_buffer raises ValueError; from_str raises a bare Exception.
        tokenizer = Tokenizer.from_buffer(json.dumps(content).encode())
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise DataError(
            f"{file}: is no tokenizer ({error}). Fetch it again, or give another tokenizer.path."
        ) from error
    return TextEncoder(tokenizer, str(file))


class TextEncoder:
    """Tokenizer for documents without added tokens, truncation, padding or randomness. Marker text stays text."""

    def __init__(self, tokenizer: Any, where: str) -> None:  # noqa: ANN401 - tokenizers carries no types
        tokenizer.encode_special_tokens = True
        tokenizer.no_truncation()
        tokenizer.no_padding()
        # Affects only the offsets, which must include the white space of a token.
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
        self._tokenizer = tokenizer
        self._where = where
        self._markers: dict[str, int] = {
            token.content: number for number, token in tokenizer.get_added_tokens_decoder().items()
        }
        self._check_bytes()

    @property
    def vocab_size(self) -> int:
        """Largest id + 1: the rows an embedding needs."""
        largest: int = max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        return largest + 1

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[EncodedText]:
        """Encode many texts on all cores. Texts of over a million characters are cut first (`split_long_text`)."""
        if max(map(len, texts), default=0) <= LONG_TEXT:
            return self._encode_short_batch(texts)
        short = iter(self._encode_short_batch([text for text in texts if len(text) <= LONG_TEXT]))
        return [next(short) if len(text) <= LONG_TEXT else self._encode_long_text(text) for text in texts]

    def _encode_short_batch(self, texts: Sequence[str]) -> list[EncodedText]:
        """Encode some million characters per call: until it ends, the library takes some hundred bytes per token."""
        encoded: list[EncodedText] = []
        for batch in _group_by_size(texts):
            found = self._tokenizer.encode_batch_fast(batch, add_special_tokens=False)
            encoded += [
                EncodedText(text, np.array(encoding.ids, dtype=np.uint32), self._compute_char_spans)
                for text, encoding in zip(batch, found, strict=True)
            ]
        return encoded

    def _encode_long_text(self, text: str) -> EncodedText:
        pieces = list(split_long_text(text))
        found = [each.ids for each in self._encode_short_batch(pieces)]
        stops = np.cumsum([len(ids) for ids in found])[:-1]

        def compute_spans(_text: str, ids: Ids) -> Spans:
            starts = accumulate(map(len, pieces), initial=0)
            each = zip(pieces, np.split(ids, stops), starts, strict=False)
            return np.concatenate([self._compute_char_spans(piece, part) + start for piece, part, start in each])

        return EncodedText(text, np.concatenate(found), compute_spans)

    def _compute_char_spans(self, text: str, ids: NDArray[np.uint32]) -> NDArray[np.int64]:
        """Return the characters [start, stop) that each token overlaps, (tokens, 2)."""
        normalizer = self._tokenizer.normalizer
        as_it_is = normalizer is None or normalizer.normalize_str(text) == text
        spans = compute_char_spans(text, self._token_byte_counts[ids]) if as_it_is else None
        if spans is None:  # normalized text: the library's offsets refer to the original
            offsets = self._tokenizer.encode(text, add_special_tokens=False).offsets
            spans = np.array(offsets, dtype=np.int64).reshape(-1, 2)
        return spans

    @cached_property
    def _token_byte_counts(self) -> NDArray[np.int64]:
        return self.count_bytes_per_token()

    def decode(self, ids: Sequence[int] | NDArray[Any], *, skip_special_tokens: bool = False) -> str:
        """Decode token ids, with markers written out unless skipped."""
        text: str = self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)
        return text

    @property
    def special_token_ids(self) -> frozenset[int]:
        """Ids of all special tokens."""
        return frozenset(self._markers.values())

    def has_special_token(self, marker: str) -> bool:
        """Return whether the special token exists."""
        return marker in self._markers

    def get_special_token_id(self, marker: str) -> int:
        """Return the id of a special token, which may be 0. Raises DataError naming a missing one."""
        if marker not in self._markers:
            raise DataError(
                f"{self._where}: has no special token {marker!r}, which this model family needs. Give the tokenizer "
                f"of the model (its special tokens: {', '.join(list(self._markers)[:12]) or 'none'})."
            )
        return self._markers[marker]

    def count_bytes_per_token(self) -> NDArray[np.int64]:
        """Return the bytes of text per id, (vocab_size,); 0 for special tokens and unused ids."""
        counts = np.zeros(self.vocab_size, dtype=np.int64)
        special = set(self._markers.values())
        for token, number in self._tokenizer.get_vocab(with_added_tokens=True).items():
            # Byte-level vocabularies spell each byte as one character.
            counts[number] = 0 if number in special else len(token)
        return counts

    def _check_bytes(self) -> None:
        """Raise DataError unless the vocabulary has all 256 bytes: the library silently drops unknown ones."""
        missing = sum(self._tokenizer.token_to_id(letter) is None for letter in pre_tokenizers.ByteLevel.alphabet())
        if missing:
            raise DataError(
                f"{self._where}: is no byte-level tokenizer: {missing} of the 256 bytes have no token, so text would "
                "be lost. Use the tokenizer of a Qwen or StarCoder model."
            )


class EncodedText:
    """Token ids of a text (tokens,), with character spans computed on demand.

    Most texts stay uncut, so their spans are not needed. Library offsets for all texts take 50 % more time and ten
    times the memory of the ids.
    """

    def __init__(self, text: str, ids: Ids, spans_of: Callable[[str, Ids], Spans]) -> None:
        self.ids = ids
        self._text, self._compute_char_spans = text, spans_of

    @cached_property
    def char_spans(self) -> Spans:
        """Characters [start, stop) of the text that each token overlaps, (tokens, 2)."""
        return self._compute_char_spans(self._text, self.ids)

    @cached_property
    def starts_character(self) -> NDArray[np.bool_]:
        """Mask of the tokens that begin at a character boundary, (tokens,) bool."""
        return np.concatenate([[True], self.char_spans[:-1, 1] <= self.char_spans[1:, 0]])[: len(self.ids)]


def _group_by_size(texts: Sequence[str]) -> Iterator[list[str]]:
    """Group texts, in their order, until a group has `_CHARACTERS_PER_CALL` characters."""
    group: list[str] = []
    size = 0
    for text in texts:
        group.append(text)
        size += len(text)
        if size >= _CHARACTERS_PER_CALL:
            yield group
            group, size = [], 0
    if group:
        yield group


def split_long_text(text: str, longest: int = LONG_TEXT) -> Iterator[str]:
    """Cut a text into pieces of at most `longest` characters, whose tokens together are those of the text.

    The pre-tokenizers of Qwen and StarCoder begin a word behind a lone line break, and before a lone space. A text
    without either in half a piece is cut anywhere, which may give other tokens there.
    """
    start = 0
    while len(text) - start > longest:
        end = _find_word_start(text, start + longest // 2, start + longest)
        yield text[start:end]
        start = end
    yield text[start:]


def _find_word_start(text: str, first: int, last: int) -> int:
    """Return the last position in (first, last] at which pre-tokenizers begin a word, or `last`."""
    for pattern, behind in ((_LINE_START, 2), (_SPACED_WORD, 1)):
        for end in range(last, first, -_SEARCHED_CHARACTERS):
            begin = max(end - _SEARCHED_CHARACTERS, first)
            found = [match.start() + behind for match in pattern.finditer(text, begin, min(end + 2, len(text)))]
            if usable := [at for at in found if at <= last]:
                return usable[-1]
    return last


def compute_char_spans(text: str, sizes: NDArray[np.int64]) -> Spans | None:
    """Return the characters [start, stop) that each token overlaps, (tokens, 2), from the bytes per token (`sizes`).

    Returns None if the tokens and the text differ in bytes.
    """
    written = np.frombuffer(text.encode(), dtype=np.uint8)
    ends = np.cumsum(sizes)
    if sizes.sum() != len(written):
        return None
    if len(written) == len(text):  # ASCII: a byte per character
        return np.stack([ends - sizes, ends], axis=1)
    character = np.cumsum((written & 0xC0) != 0x80) - 1  # character index of each byte; 10xxxxxx continues one
    return np.stack([character[ends - sizes], character[ends - 1] + 1], axis=1)


@dataclass(frozen=True)
class TokenizationSpec:
    """Part of a family that determines tokens, and so whether prepared data fits a run."""

    tokens: SpecialTokens
    layout: CodeLayout
    pre_tokenizer_pattern: str
    chat_template: str

    @classmethod
    def from_family(cls, family: Family) -> TokenizationSpec:
        """Return the spec of a family."""
        return cls(family.special_tokens, family.code_layout, family.pre_tokenizer_pattern, family.chat_template)
