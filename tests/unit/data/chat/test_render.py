"""Chat rendering: transformers' own tokens, loss on what the assistant says alone, markers only the template's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_training_toolkit.data.chat.parse import parse_conversation
from llm_training_toolkit.data.chat.render import ChatRules, render_chat
from llm_training_toolkit.data.sources import Document
from llm_training_toolkit.errors import DataError
from llm_training_toolkit.families import FAMILIES
from tiny_chat import AGENT, RECORD, WEATHER, Chat, ChatMaker


@pytest.fixture(scope="module")
def qwen3(make_chat: ChatMaker) -> Chat:
    return make_chat("qwen3")


def test_qwen3(qwen3: Chat) -> None:
    assert qwen3.marked(RECORD) == (
        "<|im_start|>user\n6*7?<|im_end|>\n<|im_start|>assistant\n[[42<|im_end|>]]\n"
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n[[<think>\n\n</think>\n\nBecause.<|im_end|>]]"
    )


def test_qwen2_and_its_default_system_text(make_chat: ChatMaker) -> None:
    assert make_chat("qwen2").marked(RECORD) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n6*7?<|im_end|>\n<|im_start|>assistant\n[[42<|im_end|>]]\n"
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n[[Because.<|im_end|>]]"
    )
    assert make_chat("qwen2.5").marked({"system": "", "prompt": "a", "completion": "b"}) == (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n[[b<|im_end|>]]"
    )
    assert make_chat("qwen2.5").marked({"system": "Rhyme.", "prompt": "a", "completion": "b"}) == (
        "<|im_start|>system\nRhyme.<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n[[b<|im_end|>]]"
    )


@pytest.mark.parametrize("family", ["starcoder", "starcoder2"])
def test_starcoder_in_plain_words(make_chat: ChatMaker, family: str) -> None:
    chat = make_chat(family)
    assert chat.marked({"system": "Be brief.", **RECORD}) == (
        "Be brief.\n\n### Instruction\n6*7?\n\n### Response\n[[42<|endoftext|>]]"
        "### Instruction\nWhy?\n\n### Response\n[[Because.<|endoftext|>]]"
    )
    assert chat.end == 0
    with pytest.raises(DataError, match=r"chats.jsonl:3: the chat template cannot write this: has no form for tools"):
        chat.render(AGENT)


TOOLS_OF_AGENT = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
    '{"type": "function", "function": {"name": "weather", "parameters": {}}}\n</tools>\n\n'
    "For each function call, return a json object with function name and arguments within <tool_call></tool_call> "
    'XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n'
)


def test_qwen3_with_thinking_and_tools(qwen3: Chat) -> None:
    """Earlier thinking is left out by the template, so nothing is trained on it."""
    assert qwen3.marked(AGENT) == (
        f"<|im_start|>system\nBe brief.\n\n{TOOLS_OF_AGENT}"
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n[[Hi<|im_end|>]]\n"
        "<|im_start|>user\nRain?<|im_end|>\n"
        "<|im_start|>assistant\n[[<think>\nLook it up.\n</think>\n\n"
        '<tool_call>\n{"name": "weather", "arguments": {"in": "Bonn", "at": 1}}\n</tool_call><|im_end|>]]\n'
        "<|im_start|>user\n<tool_response>\ndry\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n[[<think>\n\n</think>\n\nNo.<|im_end|>]]"
    )


def test_qwen2_5_with_tools(make_chat: ChatMaker) -> None:
    assert make_chat("qwen2.5").marked(AGENT) == (
        f"<|im_start|>system\nBe brief.\n\n{TOOLS_OF_AGENT}"
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n[[Hi<|im_end|>]]\n"
        "<|im_start|>user\nRain?<|im_end|>\n<|im_start|>assistant\n"
        '[[<tool_call>\n{"name": "weather", "arguments": {"in": "Bonn", "at": 1}}\n</tool_call><|im_end|>]]\n'
        "<|im_start|>user\n<tool_response>\ndry\n</tool_response><|im_end|>\n<|im_start|>assistant\n[[No.<|im_end|>]]"
    )


def test_thinking_within_the_text_is_what_the_template_makes_of_it(qwen3: Chat) -> None:
    thought = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes"}
    asked = {"role": "user", "content": "?"}
    record = {"messages": [asked, thought, asked, thought]}
    assert qwen3.said(record) == "Yes<|im_end|><think>\nhm\n</think>\n\nYes<|im_end|>"
    ids = qwen3.ids(record)
    assert (
        ids.count(qwen3.encoder.get_special_token_id("<think>"))
        == ids.count(qwen3.encoder.get_special_token_id("</think>"))
        == 1
    )


def test_what_bears_loss_can_be_chosen(qwen3: Chat) -> None:
    record = {"messages": [{"role": "system", "content": "s"}, *RECORD["messages"]]}
    last = "<think>\n\n</think>\n\nBecause.<|im_end|>"
    assert qwen3.said(record, loss="last_turn") == last
    everything = qwen3.render(record, loss="all").examples[0]
    assert everything.loss.tolist() == [False] + [True] * (len(everything.tokens) - 1)
    first, second = RECORD["messages"][1], RECORD["messages"][3]
    for switched, loss, expected in (
        ((first | {"loss": False}, second), "assistant", last),
        ((first, second | {"loss": False}), "assistant", "42<|im_end|>"),
        ((first | {"loss": True}, second), "last_turn", "42<|im_end|>" + last),
    ):
        asked, why = RECORD["messages"][0], RECORD["messages"][2]
        assert qwen3.said({"messages": [asked, switched[0], why, switched[1]]}, loss=loss) == expected


def test_a_conversation_without_loss_is_dropped_for_that(qwen3: Chat) -> None:
    record = {"messages": [RECORD["messages"][0], RECORD["messages"][1] | {"loss": False}]}
    total = len(qwen3.ids(record, loss="all"))
    assert qwen3.render(record) == (7, total, [], "no_loss")
    assert qwen3.render(record, sequence_length=total - 1, overlong="split") == (7, total, [], "no_loss")
    assert qwen3.render(record, sequence_length=total - 1) == (7, total, [], "too_long")


def test_a_token_that_is_partly_header_bears_loss(qwen3: Chat) -> None:
    """The header's line break and an answer's own are one token, here and in transformers."""
    record = {"messages": [RECORD["messages"][0], {"role": "assistant", "content": "\n42"}, RECORD["messages"][2]]}
    assert qwen3.marked(record) == (
        "<|im_start|>user\n6*7?<|im_end|>\n<|im_start|>assistant[[\n\n42<|im_end|>]]\n<|im_start|>user\nWhy?<|im_end|>"
    )
    assert qwen3.theirs_ids(record["messages"])[:-1] == qwen3.ids(record)


FAMILY_NAMES = sorted(FAMILIES)
ROUGH = st.text(alphabet="ab é漢😀\n\r\t<|>'4.", min_size=1, max_size=12).filter(str.strip)
PLAIN = st.text(alphabet="ab é漢😀\n'4.", max_size=12).map(lambda text: "a" + text)
ROLES = st.sampled_from(["user", "assistant"])


def conversations(texts: st.SearchStrategy[str]) -> st.SearchStrategy[list[dict[str, Any]]]:
    """Messages of user and assistant in any order, the assistant somewhere among them, with or without a system."""
    message = st.fixed_dictionaries({"role": ROLES, "content": texts})
    system = st.lists(st.fixed_dictionaries({"role": st.just("system"), "content": texts}), max_size=1)
    several = st.lists(message, min_size=1, max_size=5).filter(lambda m: any(x["role"] == "assistant" for x in m))
    return st.tuples(system, several).map(lambda parts: parts[0] + parts[1])


@pytest.mark.parametrize("family", FAMILY_NAMES)
@settings(max_examples=30)  # of each of fourteen families
@given(messages=conversations(ROUGH))
def test_the_tokens_are_those_of_transformers(
    make_chat: ChatMaker, family: str, messages: list[dict[str, Any]]
) -> None:
    chat = make_chat(family)
    ours, theirs = chat.ids({"messages": messages}), chat.theirs_ids(messages)
    assert theirs[: len(ours)] == ours
    assert not chat.encoder.decode(theirs[len(ours) :]).strip()


@given(thinking=st.none() | ROUGH, key=ROUGH, value=st.none() | ROUGH | st.integers(), content=st.none() | ROUGH)
def test_the_tokens_are_those_of_transformers_with_tools(
    qwen3: Chat, thinking: str | None, key: str, value: Any, content: str | None
) -> None:
    call = {"type": "function", "function": {"name": "weather", "arguments": {key: value, "a": [value]}}}
    called = {"role": "assistant", "content": content or "", "reasoning_content": thinking, "tool_calls": [call, call]}
    asked, answer = {"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}
    result = {"role": "tool", "content": content or ""}
    orders: list[list[dict[str, Any]]] = [
        [asked, called, result, result, answer],
        [asked, called, result, result, asked, called],
        [called, result, result, answer],
        [asked, called],
    ]
    for messages in orders:
        ours = qwen3.ids({"messages": messages, "tools": [WEATHER]})
        theirs = qwen3.theirs_ids(messages, [WEATHER])
        assert theirs[: len(ours)] == ours
        assert qwen3.encoder.decode(theirs[len(ours) :]) == "\n"


@pytest.mark.parametrize("family", FAMILY_NAMES)
@settings(max_examples=30)  # of each of fourteen families
@given(messages=conversations(PLAIN))
def test_loss_is_exactly_what_the_assistant_says(
    make_chat: ChatMaker, family: str, messages: list[dict[str, Any]]
) -> None:
    chat = make_chat(family)
    end = "<|im_end|>" if "qwen" in family else "<|endoftext|>"
    answers = "".join(each["content"] + end for each in messages if each["role"] == "assistant")
    assert chat.said({"messages": messages}).replace("<think>\n\n</think>\n\n", "") == answers


MARKERS = st.sampled_from(
    ["<|im_end|>", "<|im_start|>assistant\n", "</think>", "<think>", "<tool_call>", "<|endoftext|>"]
)
HOSTILE = st.lists(MARKERS | PLAIN, min_size=1, max_size=4).map("".join)


@given(texts=st.tuples(HOSTILE, HOSTILE, HOSTILE, PLAIN), wrapped=st.booleans())
def test_marker_text_in_a_message_is_never_a_marker(qwen3: Chat, texts: tuple[str, ...], wrapped: bool) -> None:
    system, user, result, answer = texts
    user = f"<tool_response>{user}</tool_response>" if wrapped else user
    call = {"name": "f", "arguments": {system: [result]}}
    tool = {"function": {"name": "f", "description": result}}
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": system},
        {"role": "user", "content": user},
        {"role": "assistant", "content": answer, "tool_calls": [call]},
        {"role": "tool", "content": result},
        {"role": "assistant", "content": answer},
    ]
    ids = qwen3.ids({"messages": messages, "tools": [tool]})
    counts = {
        marker: ids.count(qwen3.encoder.get_special_token_id(marker))
        for marker in ("<|im_start|>", "<|im_end|>", "<think>")
    }
    # A user's message that is all a tool's result is no question for the template, which then writes no thinking.
    assert counts == {"<|im_start|>": 5, "<|im_end|>": 5, "<think>": 0 if wrapped else 1}
    assert qwen3.encoder.get_special_token_id("<|endoftext|>") not in ids
    text = qwen3.encoder.decode(ids)
    assert all(each["content"] in text for each in messages)


def test_marker_text_bears_loss_as_text(qwen3: Chat) -> None:
    record = {"messages": [{"role": "user", "content": "How?"}, {"role": "assistant", "content": "With <|im_end|>."}]}
    assert qwen3.said(record) == "<think>\n\n</think>\n\nWith <|im_end|>.<|im_end|>"
    assert qwen3.ids(record).count(qwen3.encoder.get_special_token_id("<|im_end|>")) == 2


def test_too_long_is_dropped_counted_or_refused(qwen3: Chat) -> None:
    total = len(qwen3.ids(RECORD))
    assert qwen3.render(RECORD, sequence_length=total).examples
    dropped = qwen3.render(RECORD, sequence_length=total - 1)
    assert dropped == (7, total, [], "too_long")
    with pytest.raises(DataError, match=rf"chats\.jsonl:3: {total} tokens, longer than data\.sequence_length 16"):
        qwen3.render(RECORD, sequence_length=16, overlong="error")


@given(messages=conversations(st.text(alphabet="a漢😀", min_size=1, max_size=60)), length=st.integers(16, 40))
def test_too_long_is_cut_without_losing_a_token(qwen3: Chat, messages: list[dict[str, Any]], length: int) -> None:
    whole = qwen3.render({"messages": messages}).examples[0]
    chunks = qwen3.render({"messages": messages}, sequence_length=length, overlong="split").examples
    assert np.concatenate([chunk.tokens for chunk in chunks]).tolist() == whole.tokens.tolist()
    assert all(2 <= len(chunk.tokens) <= length and not chunk.loss[0] for chunk in chunks)
    assert all("\ufffd" not in qwen3.encoder.decode(chunk.tokens) for chunk in chunks)
    starts = np.cumsum([0] + [len(chunk.tokens) for chunk in chunks])[:-1]
    kept = np.concatenate([chunk.loss for chunk in chunks])
    assert (np.flatnonzero(whole.loss != kept) == [start for start in starts if whole.loss[start]]).all()


def test_neither_company_nor_order_changes_a_conversation(qwen3: Chat) -> None:
    records = [RECORD, AGENT, {"prompt": "<|im_end|>", "completion": "漢"}, {"prompt": "a", "completion": "b"}]
    documents = [(i, Document(0, str(i), parse_conversation(record).to_text())) for i, record in enumerate(records)]
    rules = ChatRules(10_000, qwen3.end)
    together = render_chat(documents, rules, qwen3.encoder, qwen3.template)
    alone = [render_chat([each], rules, qwen3.encoder, qwen3.template)[0] for each in documents[::-1]][::-1]
    for a, b in zip(together, alone, strict=True):
        assert (a.document, a.tokens) == (b.document, b.tokens)
        assert a.examples[0].tokens.tolist() == b.examples[0].tokens.tolist()
        assert a.examples[0].loss.tolist() == b.examples[0].loss.tolist()
    assert render_chat([], rules, qwen3.encoder, qwen3.template) == []


def test_text_that_is_no_conversation_is_refused(qwen3: Chat) -> None:
    documents = [(0, Document(0, "chats.jsonl:9", "def f(): pass"))]
    with pytest.raises(DataError, match=r"chats\.jsonl:9: is not the text of a conversation"):
        render_chat(documents, ChatRules(64, qwen3.end), qwen3.encoder, qwen3.template)
