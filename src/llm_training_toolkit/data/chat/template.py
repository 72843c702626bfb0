"""Chat template of a model: renders conversations and locates the assistant's turns."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_training_toolkit.data.chat.messages import ChatMessage, Conversation
from llm_training_toolkit.data.chat.template_trace import TracedTemplate, TracedText
from llm_training_toolkit.errors import DataError

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_USER = {"role": "user", "content": "What is asked."}
_ANSWER = "What is answered."
_PROBE = tuple(dict(each) for each in (_USER, {"role": "assistant", "content": _ANSWER}) * 2)


@dataclass(frozen=True)
class AssistantSpan:
    """Characters [start, stop) of the rendered text from an assistant message, including the end-of-turn marker.

    `closed`: True if a marker ends it.
    """

    message: int
    start: int
    stop: int
    closed: bool


@dataclass(frozen=True)
class RenderedChat:
    """Conversation as rendered by its template, up to the end of the last turn.

    `markers`: spans [start, stop) of template markers; the rest is text. `turns`: assistant spans by message.
    `missing_end_of_turn`: marker to append to the last turn, None if present or unknown to the template.
    `results`: spans of the results of tools.
    """

    text: str
    markers: tuple[tuple[int, int], ...]
    turns: tuple[AssistantSpan, ...]
    missing_end_of_turn: str | None
    results: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class _TurnDelimiters:
    """Text that a template writes around an answer, found by probing it.

    `heads`: possible headers of an answer, shared with the generation prompt, longest first. `tails`: text after an
    answer within the conversation, and at its end. `end`: marker that closes a turn.
    """

    heads: tuple[str, ...]
    tails: tuple[str, str]
    end: str | None


class ChatTemplate:
    """Chat template of a tokenizer or a family."""

    def __init__(self, source: str, markers: Sequence[str], variables: Mapping[str, str]) -> None:
        """Compile a template for a tokenizer's special tokens (`markers`) and variables such as `eos_token`.

        Raises DataError with the template's fault if compiling it or rendering a plain conversation fails.
        """
        self.source = source
        self._template = TracedTemplate(source, markers, variables)
        self._delimiters = _probe_delimiters(self._template)

    @classmethod
    def from_tokenizer(
        cls, tokenizer_directory: Path, family_template: str, override: str | None = None
    ) -> ChatTemplate:
        """Return the tokenizer's own template, or the family's if it has none; `override` replaces both.

        The file chat_template.jinja takes precedence over tokenizer_config.json, as in transformers. Of several named
        templates, `default` is used. Raises DataError for an unusable template.
        """
        own = override or _read_own_template(tokenizer_directory)
        markers = [
            token["content"]
            for token in _read_json_object(tokenizer_directory / "tokenizer.json").get("added_tokens", ())
        ]
        try:
            return cls(own or family_template, markers, read_special_tokens_map(tokenizer_directory))
        except DataError as error:
            raise DataError(
                f"{tokenizer_directory}: the chat template {error}. Put one that can be used into the tokenizer's "
                "chat_template.jinja."
            ) from error

    @property
    def end_of_turn(self) -> str | None:
        """Special token that ends an assistant turn, None if the template has none."""
        return self._delimiters.end

    def render_conversation(self, conversation: Conversation) -> RenderedChat:
        """Render a conversation.

        Raises DataError with the template's fault if it rejects the conversation, omits content, or leaves the
        assistant's turns ambiguous.
        """
        written = self._render_completely(conversation, prompt=False)
        spoken = [number for number, message in enumerate(conversation.messages) if message.role == "assistant"]
        turns = [turn for number in spoken for turn in self._find_assistant_spans(conversation, written, number)]
        return self._trim_after_last_turn(conversation, written, tuple(turns))

    def render_prompt(self, conversation: Conversation) -> RenderedChat:
        """Render a conversation and the header of the assistant's next turn.

        Raises DataError with the template's fault if it rejects the conversation or omits content.
        """
        written = self._render_completely(conversation, prompt=True)
        return RenderedChat(written.text, written.markers, turns=(), missing_end_of_turn=None)

    def _render_completely(self, conversation: Conversation, *, prompt: bool) -> TracedText:
        """Render a conversation. Raises DataError for content that the template omits."""
        messages = [_build_template_message(message) for message in conversation.messages]
        tools = [json.loads(tool) for tool in conversation.tools]
        written = self._template.render_messages(messages, tools, prompt=prompt)
        _check_complete(conversation, tools, written.text)
        return written

    def _find_assistant_spans(
        self, conversation: Conversation, written: TracedText, number: int
    ) -> list[AssistantSpan]:
        """Return the spans of an assistant message: one, or one for each `{% generation %}` block."""
        if number not in written.message_spans:
            raise DataError(f"does not write message {number} in a loop over the messages")
        start, stop = written.message_spans[number]
        said = [span for span in written.generation_spans if start <= span[0] and span[1] <= stop]
        if said:
            return [self._include_end_of_turn(written, AssistantSpan(number, *span, closed=False)) for span in said]
        follows = number > 0 and conversation.messages[number - 1].role == "assistant"
        start += self._get_header_length(written.text[start:stop], number, may_be_missing=follows)
        return [self._trim_after_answer(written, AssistantSpan(number, start, stop, closed=False))]

    def _include_end_of_turn(self, written: TracedText, turn: AssistantSpan) -> AssistantSpan:
        """Return a `{% generation %}` block, with the end-of-turn marker if it directly follows."""
        for start, stop in written.markers:
            if turn.stop in {start, stop} and written.text[start:stop] == self._delimiters.end:
                return AssistantSpan(turn.message, turn.start, stop, closed=True)
        return turn

    def _get_header_length(self, part: str, number: int, *, may_be_missing: bool) -> int:
        """Return the length of the header. A template may omit the header after another assistant message."""
        for head in self._delimiters.heads:
            leading, found, _ = part.partition(head)
            if found and not leading.strip():
                return len(leading) + len(head)
        if may_be_missing or not self._delimiters.heads:
            return 0
        raise DataError(
            f"begins message {number} in another way than a prompt for the assistant, so it cannot be told where the "
            "assistant speaks; {% generation %} blocks in the template would show it"
        )

    def _trim_after_answer(self, written: TracedText, turn: AssistantSpan) -> AssistantSpan:
        """Return the turn up to its last end-of-turn marker, or without the template's text after answers."""
        ends = [
            stop
            for start, stop in written.markers
            if turn.start <= start and stop <= turn.stop and written.text[start:stop] == self._delimiters.end
        ]
        if ends:
            return AssistantSpan(turn.message, turn.start, ends[-1], closed=True)
        tail = self._delimiters.tails[turn.stop == len(written.text)]
        stop = turn.stop - len(tail) if written.text.endswith(tail, turn.start, turn.stop) else turn.stop
        return AssistantSpan(turn.message, turn.start, stop, closed=False)

    def _trim_after_last_turn(
        self, conversation: Conversation, written: TracedText, turns: tuple[AssistantSpan, ...]
    ) -> RenderedChat:
        """Drop the text after the last turn: a line break, or the header of an empty turn."""
        stop, closing = len(written.text), None
        if conversation.messages[-1].role == "assistant":
            stop = turns[-1].stop
            closing = None if turns[-1].closed else self._delimiters.end
        elif written.markers and not written.text[written.markers[-1][1] :].strip():
            stop = written.markers[-1][1]
        markers = tuple(marker for marker in written.markers if marker[1] <= stop)
        results = (
            written.message_spans[number]
            for number, message in enumerate(conversation.messages)
            if message.role == "tool" and number in written.message_spans
        )
        return RenderedChat(
            written.text[:stop], markers, turns, closing, tuple((start, min(end, stop)) for start, end in results)
        )


def _probe_delimiters(template: TracedTemplate) -> _TurnDelimiters:
    probe, question, prompted = (
        template.render_messages(_PROBE),
        template.render_messages([_USER]),
        template.render_messages([_USER], prompt=True),
    )
    if any(number not in probe.message_spans or _ANSWER not in _get_message_text(probe, number) for number in (1, 3)):
        raise DataError("does not write the messages in a loop over them")
    first, last = (_get_message_text(probe, number).partition(_ANSWER) for number in (1, 3))
    prompt = prompted.text[len(question.text) :] if prompted.text.startswith(question.text) else ""
    # Templates that write the prompt never or always still share a header between answers.
    heads = {_find_common_header(prompt or last[0], header) for header in (first[0], last[0])}
    longest_first = tuple(sorted(filter(None, heads), key=len, reverse=True))
    return _TurnDelimiters(longest_first, (first[2], last[2]), _find_end_of_turn(probe))


def _find_common_header(prompt: str, header: str) -> str:
    """Return the header common to a prompt and the text before an answer: all of `header`, or the end of the prompt.

    The prompt may begin earlier (with the end of the user's turn), and either may continue (with thinking).
    """
    header = header.lstrip() or header
    for at in range(len(prompt)):
        if prompt.startswith(header, at):
            return header
        if header.startswith(prompt[at:]):
            return prompt[at:]
    if header.strip():
        raise DataError(f"writes {header!r} before an answer, and not so where it prompts for one")
    return ""


def _get_message_text(written: TracedText, number: int) -> str:
    start, stop = written.message_spans[number]
    return written.text[start:stop]


def _find_end_of_turn(probe: TracedText) -> str | None:
    """Return the first marker after an answer: within the conversation, or else at its end."""
    for number in (1, 3):
        start, stop = probe.message_spans[number]
        after = probe.text.index(_ANSWER, start) + len(_ANSWER)
        for begin, end in probe.markers:
            if after <= begin and end <= stop:
                return probe.text[begin:end]
    return None


def _check_complete(conversation: Conversation, tools: Sequence[Mapping[str, Any]], text: str) -> None:
    """Raise DataError for omitted content: some templates silently drop system texts or tools."""
    lost = [
        f"message {number} ({message.role})"
        for number, message in enumerate(conversation.messages)
        # Templates may reformat tool results, and reasoning within a text.
        if message.role != "tool" and "</think>" not in message.content and message.content.strip() not in text
    ]
    lost += [
        f"the context of message {number}"
        for number, message in enumerate(conversation.messages)
        if message.context is not None and message.context.strip() not in text
    ]
    calls = [call.name for message in conversation.messages for call in message.tool_calls]
    lost += [f"the call of {name}" for name in calls if name not in text]
    names = [tool.get("function", tool).get("name", "") for tool in tools]
    lost += [f"the tool {name}" for name in names if name not in text]
    if lost:
        raise DataError(f"leaves out {', '.join(lost[:3])}")


def _build_template_message(message: ChatMessage) -> dict[str, Any]:
    """Return a message in the form templates expect, call arguments as objects (required by Hugging Face)."""
    values: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.name is not None:
        values["name"] = message.name
    if message.context is not None:
        values["context"] = message.context
    if message.thinking is not None:
        # Both names, as in transformers: gpt-oss reads the second.
        values |= {"reasoning_content": message.thinking, "thinking": message.thinking}
    if message.tool_calls:
        values["tool_calls"] = [
            {"type": "function", "function": {"name": call.name, "arguments": json.loads(call.arguments)}}
            for call in message.tool_calls
        ]
    return values


def has_template(directory: Path) -> bool:
    """Return whether a tokenizer has its own chat template."""
    return bool(_read_own_template(directory))


def _read_own_template(directory: Path) -> str | None:
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = _read_json_object(directory / "tokenizer_config.json").get("chat_template")
    if not isinstance(template, list):
        return template
    named = {each["name"]: each["template"] for each in template}
    if "default" not in named:
        raise DataError(
            f"{directory}: has chat templates called {', '.join(named)}, and none is called default. Call one so in "
            "tokenizer_config.json."
        )
    return str(named["default"])


def read_special_tokens_map(directory: Path) -> dict[str, str]:
    """Return a tokenizer's special tokens by name (such as `eos_token`), as transformers passes them to templates."""
    known = _read_json_object(directory / "special_tokens_map.json") | _read_json_object(
        directory / "tokenizer_config.json"
    )
    tokens = {name: known[name] for name in _NAMED_TOKENS if known.get(name) is not None}
    return {name: token["content"] if isinstance(token, Mapping) else token for name, token in tokens.items()}


def _read_json_object(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file, empty if the file is absent."""
    if not file.is_file():
        return {}
    try:
        values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read ({error}). Fetch the tokenizer again.") from error
    return values
