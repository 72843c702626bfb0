"""The model of a server: requests become prompts in its family's tokens."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass
from typing import Any

from llm_training_toolkit.data.chat.messages import ChatMessage, Conversation, InvalidRecord, ToolCall
from llm_training_toolkit.data.chat.parse import parse_request_messages
from llm_training_toolkit.data.chat.template import ChatTemplate, has_template
from llm_training_toolkit.errors import DataError, PlanError
from llm_training_toolkit.families import check_model_type
from llm_training_toolkit.generation.generator import TextGenerator, TokenizedPrompt
from llm_training_toolkit.generation.load import open_model
from llm_training_toolkit.generation.reply_parser import CALL_CLOSE, CALL_OPEN, REPLY_TAGS, parse_tool_call
from llm_training_toolkit.runs.storage.open import open_path
from llm_training_toolkit.serving.api_error import ApiError
from llm_training_toolkit.serving.request_body import ChatBody, CompletionBody
from llm_training_toolkit.serving.settings import ServingSettings

_PROBED_TOOL = {"type": "function", "function": {"name": "probe", "parameters": {}}}


@dataclass(frozen=True)
class ServedPrompt:
    """Prompt of a request. `written_ids`: special tokens written out. `opens_thinking`: it ends within reasoning."""

    tokens: TokenizedPrompt
    written_ids: frozenset[int] = frozenset()
    opens_thinking: bool = False


class ServedModel:
    """Model with its tokenizer, chat template and name."""

    def __init__(self, generator: TextGenerator, name: str) -> None:
        self.generator, self.name = generator, name
        directory = generator.directory
        self._template = ChatTemplate.from_tokenizer(directory, "") if has_template(directory) else None
        self._takes_tools = self._template is not None and _writes_known_calls(self._template)
        self._tag_ids = frozenset(
            generator.encoder.get_special_token_id(tag)
            for tag in REPLY_TAGS
            if generator.encoder.has_special_token(tag)
        )
        self._one_at_a_time = threading.Lock()  # tracing keeps state in the compiled template

    @classmethod
    def open(cls, settings: ServingSettings) -> ServedModel:
        """Load the model. Raises ToolkitError as `ltt generate` does, and PlanError for another family."""
        with open_path(settings.model, export=settings.step is None) as opened:
            generator, where = open_model(opened, step=settings.step, device=settings.device)
            check_model_type(generator.model.config.model_type, where)
            return cls(generator, settings.name)  # reads the template, which a URI's staging directory takes with it

    def describe_features(self) -> dict[str, Any]:
        """Return what requests the model can answer, for the list of models."""
        return {
            "chat": self._template is not None,
            "tools": self._takes_tools,
            "infill": self.generator.has_fim_sentinels(),
            "context_length": self.generator.context_length,
        }

    def tokenize_completion(self, body: CompletionBody) -> ServedPrompt:
        """Return the prompt of /v1/completions. Raises ApiError 400 for a suffix without sentinels."""
        if body.suffix is None:
            return ServedPrompt(self.generator.tokenize_prompt(body.prompt))
        try:
            return ServedPrompt(self.generator.tokenize_gap(body.prompt, body.suffix))
        except PlanError as error:
            raise ApiError(400, "suffix_not_supported", str(error), "suffix") from error

    def tokenize_chat(self, body: ChatBody) -> ServedPrompt:
        """Return the prompt of /v1/chat/completions.

        Raises ApiError 400 without a chat template, for tools that it writes in an unknown form, and for messages that
        it cannot render.
        """
        if self._template is None:
            message = f"{self.name} has no chat template: it continues text at /v1/completions"
            raise ApiError(400, "chat_not_supported", message, "messages")
        if body.tools and not self._takes_tools:
            message = f"the chat template of {self.name} writes no calls in the form {CALL_OPEN}{{…}}{CALL_CLOSE}"
            raise ApiError(400, "tools_not_supported", message, "tools")
        with self._one_at_a_time:
            try:
                conversation = _build_conversation(body)
                tokens = self.generator.tokenize_conversation(conversation, self._template)
            except InvalidRecord as error:
                raise ApiError(400, "invalid_messages", error.why, "messages") from error
            except PlanError as error:
                raise ApiError(400, "invalid_messages", str(error), "messages") from error
        return ServedPrompt(tokens, self._tag_ids, self.generator.opens_thinking(tokens))

    def compute_new_tokens(self, prompt: ServedPrompt, asked: int | None, limit: int) -> int:
        """Return the new tokens of an answer at most; `asked` None = `limit`, or the rest of the context.

        Raises ApiError 400 for an empty prompt, for more tokens than the limit, and beyond the context.
        """
        count, context = len(prompt.tokens.ids), self.generator.context_length
        if not count:
            raise ApiError(400, "empty_prompt", "the prompt is empty: give at least one character", "prompt")
        if asked is not None and asked > limit:
            message = f"max_tokens is {asked}, and this server allows {limit} at most"
            raise ApiError(400, "max_tokens_too_large", message, "max_tokens")
        if count + (asked or 1) > context:
            raise ApiError(
                400,
                "context_length_exceeded",
                f"the context of {self.name} is {context:,} tokens; the prompt has {count:,} and the answer may have "
                f"{asked or 1:,}: shorten the prompt, or ask for fewer tokens",
                "prompt" if asked is None else "max_tokens",
            )
        return min(limit, context - count) if asked is None else asked


def _build_conversation(body: ChatBody) -> Conversation:
    messages = [
        {**message, "role": "system"} if message.get("role") == "developer" else message  # OpenAI's newer name
        for message in body.messages
    ]
    return parse_request_messages(messages, None if body.tool_choice == "none" else body.tools)


def _writes_known_calls(template: ChatTemplate) -> bool:
    """Return whether a template writes a tool call in the form that answers are searched for."""
    call = ToolCall("probe", '{"value": 1}')
    messages = (ChatMessage("user", "Probe."), ChatMessage("assistant", "", tool_calls=(call,)))
    try:
        written = template.render_conversation(Conversation(messages, (json.dumps(_PROBED_TOOL),)))
    except DataError:
        return False
    _, _, said = written.text.rpartition(CALL_OPEN)
    return parse_tool_call(said.partition(CALL_CLOSE)[0]) == (call.name, call.arguments)
