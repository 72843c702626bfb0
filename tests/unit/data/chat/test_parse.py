"""Conversations: recognised in every usual shape of a record, refused with words, kept as canonical text."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_training_toolkit.data.chat.parse import ChatMessage, Conversation, InvalidRecord, ToolCall, parse_conversation

ASKED, ANSWERED = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
SYSTEM = {"role": "system", "content": "Be brief."}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "a": 1}}}


def spoken(record: dict[str, Any]) -> list[str]:
    """A record's conversation, a line for each message: who, what, and `+` or `-` for a loss switch."""
    return [
        f"{message.role}: {message.content}" + {None: "", True: " +", False: " -"}[message.loss]
        for message in parse_conversation(record).messages
    ]


SHAPES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "messages": ({"messages": [SYSTEM, ASKED, ANSWERED], "id": 7}, ["system: Be brief.", "user: 2+2?", "assistant: 4"]),
    "messages with parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "2"}, {"text": "+2?"}]}, ANSWERED]},
        ["user: 2+2?", "assistant: 4"],
    ),
    "messages of StarChat, system empty": (
        {"messages": [{"content": "", "role": "system"}, {"content": "2+2?", "role": "user"}, ANSWERED]},
        ["system: ", "user: 2+2?", "assistant: 4"],
    ),
    "messages beside the prompt they begin with": (
        {"prompt": "2+2?", "prompt_id": "x", "messages": [ASKED, ANSWERED]},
        ["user: 2+2?", "assistant: 4"],
    ),
    "messages with weights": (
        {"messages": [ASKED, ANSWERED | {"weight": 0}, ASKED | {"loss": False}, ANSWERED | {"loss": True}]},
        ["user: 2+2?", "assistant: 4 -", "user: 2+2?", "assistant: 4 +"],
    ),
    "messages, null where a table has no value": (
        {
            "messages": [ASKED | {"tool_calls": None, "name": None, "loss": None}, ANSWERED],
            "tools": None,
            "prompt": None,
        },
        ["user: 2+2?", "assistant: 4"],
    ),
    "messages, Qwen2.5-Coder's switch": (
        {"messages": [ASKED, ANSWERED, ASKED, ANSWERED], "only_last_turn_loss": True, "format": "chatml"},
        ["user: 2+2?", "assistant: 4 -", "user: 2+2?", "assistant: 4"],
    ),
    "conversations of Qwen": (
        {"id": "identity_0", "conversations": [{"from": "user", "value": "2+2?"}, {"from": "assistant", "value": "4"}]},
        ["user: 2+2?", "assistant: 4"],
    ),
    "conversations of ShareGPT": (
        {
            "system": "Be brief.",
            "conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}],
        },
        ["system: Be brief.", "user: 2+2?", "assistant: 4"],
    ),
    "conversations with a tool": (
        {
            "conversations": [
                {"from": "human", "value": "Rain?"},
                {"from": "function_call", "value": '{"name": "weather", "arguments": {}}'},
                {"from": "observation", "value": "dry"},
                {"from": "gpt", "value": "No."},
            ]
        },
        ["user: Rain?", "assistant: ", "tool: dry", "assistant: No."],
    ),
    "conversation": ({"conversation": [ASKED, ANSWERED], "language": "en"}, ["user: 2+2?", "assistant: 4"]),
    "prompt and completion": ({"prompt": "2+2?", "completion": "4"}, ["user: 2+2?", "assistant: 4"]),
    "prompt and completion as messages": (
        {"prompt": [SYSTEM, ASKED, ANSWERED, ASKED], "completion": [ANSWERED]},
        ["system: Be brief.", "user: 2+2?", "assistant: 4 -", "user: 2+2?", "assistant: 4"],
    ),
    "instruction without input": ({"instruction": "2+2?", "input": "", "output": "4"}, ["user: 2+2?", "assistant: 4"]),
    "instruction with input": (
        {"instruction": "Add.", "input": "2 2", "output": "4", "text": "Add. 2 2 4"},
        ["user: Add.\n2 2", "assistant: 4"],
    ),
    "instruction with history and system": (
        {"instruction": "2+2?", "output": "4", "history": [["1+1?", "2"]], "system": "Be brief."},
        ["system: Be brief.", "user: 1+1?", "assistant: 2", "user: 2+2?", "assistant: 4"],
    ),
    "instruction and response": ({"instruction": "2+2?", "response": "4"}, ["user: 2+2?", "assistant: 4"]),
    "question and answer": ({"question": "2+2?", "answer": "4"}, ["user: 2+2?", "assistant: 4"]),
    "question and response": (
        {"system_prompt": "Be brief.", "question": "2+2?", "response": "4"},
        ["system: Be brief.", "user: 2+2?", "assistant: 4"],
    ),
    "an assistant that begins, a user who ends": ({"messages": [ANSWERED, ASKED]}, ["assistant: 4", "user: 2+2?"]),
    "a tool that nobody called, with nothing to say": (
        {"messages": [ASKED, {"role": "tool", "content": ""}, ANSWERED]},
        ["user: 2+2?", "tool: ", "assistant: 4"],
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_usual_shape_is_recognised(shape: str) -> None:
    record, expected = SHAPES[shape]
    assert spoken(record) == expected


CALLS: dict[str, Any] = {
    "OpenAI": {
        "tool_calls": [{"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"b":1,"a":2}'}}]
    },
    "Hugging Face": {
        "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"b": 1, "a": 2}}}]
    },
    "Qwen": {"tool_calls": [{"name": "weather", "arguments": {"b": 1, "a": 2}}]},
    "OpenAI's first": {"function_call": {"name": "weather", "arguments": '{"b": 1, "a": 2}'}},
}


@pytest.mark.parametrize("form", CALLS)
def test_calls_of_tools_are_the_same_in_every_form(form: str) -> None:
    record = {
        "messages": [ASKED, {"role": "assistant", "content": None, "reasoning_content": "Look.", **CALLS[form]}],
        "tools": [WEATHER],
    }
    conversation = parse_conversation(record)
    call = ToolCall("weather", '{"b": 1, "a": 2}')  # the order of the keys is the record's
    assert conversation.messages[1] == ChatMessage("assistant", "", thinking="Look.", tool_calls=(call,))
    assert [json.loads(tool) for tool in conversation.tools] == [WEATHER]
    assert parse_conversation({**record, "tools": json.dumps([WEATHER])}) == conversation


@pytest.mark.parametrize("arguments", ["", None, {}, "{}"])
def test_a_call_without_arguments_has_none(arguments: Any) -> None:
    called = {"role": "assistant", "content": "", "tool_calls": [{"name": "now", "arguments": arguments}]}
    assert parse_conversation({"messages": [ASKED, called]}).messages[1].tool_calls == (ToolCall("now", "{}"),)


UNUSABLE: dict[str, tuple[Any, str, str]] = {
    "no shape": ({"text": "hello", "url": "x"}, "unknown_shape", r"its fields are \['text', 'url'\].*messages"),
    "a question without an answer": ({"instruction": "2+2?", "input": ""}, "unknown_shape", "instruction/output"),
    "no record": (["user", "2+2?"], "not_an_object", "is list, not an object"),
    "two shapes": (
        {"messages": [ASKED], "prompt": "a", "completion": "b"},
        "ambiguous",
        "messages and prompt/completion",
    ),
    "two answers": ({"prompt": "a", "completion": "b", "response": "c"}, "ambiguous", "completion and prompt/response"),
    "two systems": ({"messages": [SYSTEM, ASKED, ANSWERED], "system": "x"}, "ambiguous", "system text of its own"),
    "empty list": ({"messages": []}, "no_messages", "messages is empty"),
    "no list": ({"messages": "hello"}, "not_a_list", "messages is str, not a list"),
    "no object": ({"messages": [ASKED, "4"]}, "not_an_object", r"messages\[1\] is str, not an object"),
    "no role": (
        {"messages": [{"content": "x"}]},
        "no_role",
        r"messages\[0\] has no role or from \(its fields: content\)",
    ),
    "unknown role": (
        {"messages": [ASKED, {"role": "bot", "content": "4"}]},
        "unknown_role",
        r"messages\[1\]: the role is 'bot'; known are system, user, human, assistant",
    ),
    "two roles": (
        {"messages": [{"role": "user", "from": "gpt", "content": "x"}]},
        "ambiguous",
        "role and from, which differ",
    ),
    "no content": (
        {"messages": [ASKED, {"role": "assistant"}]},
        "no_content",
        r"messages\[1\] has no content or value",
    ),
    "content null": ({"messages": [{"role": "user", "content": None}, ANSWERED]}, "no_content", r"messages\[0\]"),
    "content a number": ({"messages": [ASKED | {"content": 4}]}, "not_text", r"messages\[0\]\.content is 4, not text"),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]},
        "not_text",
        r"messages\[0\]\.content\[0\] is 'image', and only parts of type 'text'",
    ),
    "half a character": (
        {"messages": [ASKED | {"content": "\ud83d"}]},
        "not_text",
        "not text .surrogates.*character 0",
    ),
    "empty answer": (
        {"messages": [ASKED, ANSWERED | {"content": " \n"}]},
        "empty_message",
        r"messages\[1\]: the assistant",
    ),
    "empty question": ({"instruction": "", "output": "4"}, "empty_message", "instruction: the user's text is empty"),
    "no assistant": ({"messages": [SYSTEM, ASKED]}, "no_assistant", "no message is the assistant's"),
    "loss on the user": ({"messages": [ASKED | {"loss": True}, ANSWERED]}, "bad_loss", "loss on the user"),
    "half a loss": ({"messages": [ASKED, ANSWERED | {"weight": 0.5}]}, "bad_loss", "loss is 0.5; known are true"),
    "two losses": ({"messages": [ASKED, ANSWERED | {"weight": 0, "loss": True}]}, "ambiguous", "loss and weight"),
    "a call of nothing": (
        {"messages": [ASKED, {"role": "assistant", "tool_calls": [{"arguments": {}}]}]},
        "bad_tool_call",
        r"messages\[1\]\.tool_calls\[0\] is \{'arguments': \{\}\}, not an object with a name",
    ),
    "arguments cut off": (
        {"messages": [ASKED, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": '{"a": '}]}]},
        "bad_tool_call",
        r"tool_calls\[0\]: the arguments are '\{\"a\": ', not a JSON object",
    ),
    "a tool that is a name": (
        {"messages": [ASKED, ANSWERED], "tools": ["f"]},
        "bad_tools",
        r"tools\[0\] is 'f', not a JSON",
    ),
    "tools that are no list": ({"messages": [ASKED, ANSWERED], "tools": {"f": 1}}, "bad_tools", "not a list of JSON"),
    "history of one": (
        {"instruction": "x", "output": "y", "history": [["a"]]},
        "not_a_list",
        r"history\[0\] is not a pair",
    ),
    "history of none": ({"instruction": "x", "output": "y", "history": 3}, "not_a_list", "history is int"),
    "system a number": ({"messages": [ASKED, ANSWERED], "system": 3}, "not_text", "system is 3, not text"),
}


@pytest.mark.parametrize("fault", UNUSABLE)
def test_what_cannot_be_used_is_refused_with_words_and_a_reason(fault: str) -> None:
    record, reason, words = UNUSABLE[fault]
    with pytest.raises(InvalidRecord, match=words) as caught:
        parse_conversation(record)
    assert caught.value.reason == reason
    assert str(caught.value) == caught.value.why


def test_the_text_is_canonical_and_compact() -> None:
    conversation = parse_conversation({"tools": [WEATHER], "messages": [SYSTEM, ASKED, ANSWERED | {"loss": False}]})
    assert conversation.to_text() == (
        '{"messages":[{"content":"Be brief.","role":"system"},{"content":"2+2?","role":"user"},'
        '{"content":"4","loss":false,"role":"assistant"}],'
        '"tools":["{\\"type\\": \\"function\\", \\"function\\": {\\"name\\": \\"weather\\", '
        '\\"parameters\\": {\\"type\\": \\"object\\", \\"a\\": 1}}}"]}'
    )


def test_one_conversation_in_two_shapes_has_one_text() -> None:
    texts = {
        parse_conversation(record).to_text()
        for record in (
            {"prompt": "Größe?", "completion": "漢"},
            {"messages": [{"content": "Größe?", "role": "user"}, {"role": "assistant", "content": "漢"}], "id": 1},
            {"conversations": [{"from": "human", "value": "Größe?"}, {"from": "gpt", "value": "漢"}]},
        )
    }
    assert texts == {'{"messages":[{"content":"Größe?","role":"user"},{"content":"漢","role":"assistant"}]}'}


texts = st.text(max_size=20)
calls = st.builds(ToolCall, texts, st.dictionaries(texts, st.integers(), max_size=2).map(json.dumps))
messages = st.builds(
    ChatMessage,
    st.sampled_from(["system", "user", "assistant", "tool"]),
    texts,
    st.none() | texts,
    st.lists(calls, max_size=2).map(tuple),
    st.none() | texts,
    st.none() | st.booleans(),
)


@given(st.lists(messages, max_size=4), st.lists(texts, max_size=2))
def test_the_text_gives_the_conversation_back(spoken: list[ChatMessage], tools: list[str]) -> None:
    conversation = Conversation(tuple(spoken), tuple(tools))
    assert Conversation.from_text(conversation.to_text()) == conversation


@pytest.mark.parametrize("text", ["", "[]", '{"messages": 3}', '{"messages": [{"role": "user"}]}', "def f(): pass"])
def test_text_of_something_else_is_refused(text: str) -> None:
    with pytest.raises(InvalidRecord, match="is not the text of a conversation"):
        Conversation.from_text(text)
