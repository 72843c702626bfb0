"""Signatures in a task of Ray: refused on a node whose library hashes otherwise."""

from __future__ import annotations

import socket

import pytest

from llm_training_toolkit.data.prepare.min_hash import compute_signature, load_min_hash
from llm_training_toolkit.errors import DataError
from llm_training_toolkit.launch.ray.data_prep import _sign_texts

pytest.importorskip("rensa", reason="pinned in requirements.txt; near-duplicates alone need it")
TEXTS = ["one two three four five six", "short"]


def test_node_with_other_hashes_is_named() -> None:
    version = load_min_hash().ALGORITHM_VERSION
    assert _sign_texts(TEXTS, 8, version) == [compute_signature(TEXTS[0], 8), None]
    with pytest.raises(DataError, match=f"{socket.gethostname()}: data.near_duplicates"):
        _sign_texts(TEXTS, 8, "other")
