"""Chats of a tiny tokenizer, for the tests of templates and masks."""

from __future__ import annotations

import pytest

from tiny_chat import ChatMaker


@pytest.fixture(scope="module")
def make_chat(tmp_path_factory: pytest.TempPathFactory) -> ChatMaker:
    return ChatMaker(tmp_path_factory)
