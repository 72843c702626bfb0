"""Task `tool_calls`: the model writes the turns of conversations that call tools, and its calls are checked.

A turn is valid if it has a call and all its calls are valid. A valid call is a JSON object between `<tool_call>` and
`</tool_call>` (the form of Hermes, Qwen2.5 and Qwen3). It names a tool of the conversation, and its arguments fit the
tool's JSON schema. No call is compared with the one in the data: many are right.
"""

from __future__ import annotations

import hashlib
import heapq
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple, get_args

from jsonschema import SchemaError
from jsonschema.validators import validator_for
from referencing import Registry
from referencing.exceptions import Unresolvable

from llm_training_toolkit.data.chat.messages import Conversation, ToolCall
from llm_training_toolkit.data.chat.render import encode_prompt
from llm_training_toolkit.data.chat.template import ChatTemplate
from llm_training_toolkit.data.sources import Document
from llm_training_toolkit.errors import DataError
from llm_training_toolkit.evaluation.batch_generate import generate_completions
from llm_training_toolkit.evaluation.documents import format_data_description, read_eval_documents
from llm_training_toolkit.evaluation.model import EvalModel
from llm_training_toolkit.evaluation.task import EvalResult, ProgressCallback, ToolCallsTask
from llm_training_toolkit.models.sampling import SamplingParams

CallFault = Literal["no_call", "malformed", "unknown_tool", "bad_arguments"]
_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
# No schema, a `$ref` to nothing or to itself, a `$schema` or an `$id` that is no address.
_SCHEMA_ERRORS = (SchemaError, Unresolvable, RecursionError, TypeError, ValueError, AttributeError)


class _CallingTurn(NamedTuple):
    """Turn that calls tools in the data: the conversation before it, and the document's name."""

    before: Conversation
    wanted: tuple[ToolCall, ...]
    document: str


def measure_tool_calls(task: ToolCallsTask, subject: EvalModel, progress: ProgressCallback) -> EvalResult:
    """Generate one turn per conversation and count those whose calls are valid.

    Raises DataError for documents without a turn that calls a tool, and for a chat template of another form of calls.
    """
    template = ChatTemplate.from_tokenizer(subject.directory, subject.tokenization_spec.chat_template)
    turns = _choose_turns(read_eval_documents(subject, task.data, "chat"), task.limit)
    if not turns:
        raise DataError("--data: no conversation has `tools` and a turn that calls one of them")
    _check_form(turns[0], template)
    room = min(task.tokens, subject.context_length // 2)
    prompts = [encode_prompt(turn.before, template, subject.text_encoder) for turn in turns]
    fitting = [number for number, prompt in enumerate(prompts) if len(prompt) <= subject.context_length - room]
    if not fitting:
        raise DataError(f"--context {subject.context_length}: no conversation fits with {room} new tokens")
    written = generate_completions(
        subject,
        [prompts[number] for number in fitting],
        SamplingParams(max_new_tokens=room),
        stops=(),
        batch_size=task.batch,
        done=lambda done: progress("turns written", done, len(fitting)),
    )
    items = [_build_item(turns[number], answer.text) for number, answer in zip(fitting, written, strict=True)]
    counts = Counter(item["fault"] for item in items)
    note = f"{len(turns) - len(items)} of {len(turns)} turns do not fit the context with their answer: left out"
    return EvalResult(
        {
            "valid": counts[None] / len(items),
            "turns": len(items),
            **{fault: counts[fault] for fault in get_args(CallFault)},
            "too_long": len(turns) - len(items),
        },
        format_data_description(subject, task.data),
        {"limit": task.limit, "tokens": room, "context": subject.context_length},
        [note] if len(items) < len(turns) else [],
        items,
    )


def find_call_fault(text: str, tools: Sequence[str]) -> CallFault | None:
    """Return the first fault of the calls in an answer, None if all of them are valid; tools: JSON schemas as text."""
    schemas = dict(map(_read_schema, tools))
    _, *calls = text.split(_OPEN)
    faults = (_find_fault_of_call(call, schemas) for call in calls)
    return next((fault for fault in faults if fault is not None), None) if calls else "no_call"


def _find_fault_of_call(text: str, schemas: Mapping[str, Mapping[str, Any]]) -> CallFault | None:
    body, closed, _ = text.partition(_CLOSE)
    try:
        call = json.loads(body)
    except (ValueError, RecursionError):
        return "malformed"
    if not closed or not isinstance(call, dict) or not isinstance(call.get("arguments"), dict):
        return "malformed"
    if call.get("name") not in schemas:
        return "unknown_tool" if isinstance(call.get("name"), str) else "malformed"
    schema = schemas[call["name"]]
    try:
        kind = validator_for(schema)
        kind.check_schema(schema)
        is_valid = kind(schema, registry=Registry()).is_valid(call["arguments"])  # the registry fetches no address
    except _SCHEMA_ERRORS:  # a tool that describes its parameters in another way: its name alone is checked
        return None
    return None if is_valid else "bad_arguments"


def _read_schema(tool: str) -> tuple[str, Mapping[str, Any]]:
    """Return the name and the schema of the parameters of a tool, in OpenAI's form or without `function` around it."""
    values = json.loads(tool)
    function = values["function"] if isinstance(values.get("function"), dict) else values
    return str(function.get("name", "")), function.get("parameters") or {}


def _choose_turns(documents: Iterable[Document], limit: int) -> list[_CallingTurn]:
    """Choose one calling turn per conversation, and the conversations with the smallest content hashes."""
    chosen = heapq.nsmallest(limit, _find_turns(documents), key=lambda pair: pair[0])
    return [turn for _, turn in chosen]


def _find_turns(documents: Iterable[Document]) -> Iterator[tuple[bytes, _CallingTurn]]:
    for document in documents:
        conversation = Conversation.from_text(document.text)
        calling = [number for number, message in enumerate(conversation.messages) if number and message.tool_calls]
        if conversation.tools and calling:
            digest = hashlib.sha256(document.content_digest).digest()
            number = calling[int.from_bytes(digest[:8], "big") % len(calling)]
            before = replace(conversation, messages=conversation.messages[:number])
            yield digest, _CallingTurn(before, conversation.messages[number].tool_calls, document.name)


def _check_form(turn: _CallingTurn, template: ChatTemplate) -> None:
    """Raise DataError if the template writes calls in a form that is not read here."""
    call = ToolCall(turn.wanted[0].name, "{}")
    answer = replace(turn.before.messages[0], role="assistant", content="", context=None, tool_calls=(call,))
    written = template.render_conversation(replace(turn.before, messages=(*turn.before.messages, answer)))
    said = "".join(written.text[each.start : each.stop] for each in written.turns[-1:])
    if find_call_fault(said, ()) != "unknown_tool":
        raise DataError(
            f"the chat template writes a call in another form than {_OPEN}{{…}}{_CLOSE}: {said[:80]!r}. Only that form "
            "can be checked."
        )


def _build_item(turn: _CallingTurn, text: str) -> dict[str, Any]:
    wanted = [{"name": call.name, "arguments": json.loads(call.arguments)} for call in turn.wanted]
    fault = find_call_fault(text, turn.before.tools)
    return {"document": turn.document, "wanted": wanted, "written": text, "fault": fault}
