"""Answer to one request, whole or as a stream of events; ends early when its client leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

from llm_training_toolkit.generation.reply_parser import ReplyParser, ReplyPart
from llm_training_toolkit.serving.api_error import ApiError
from llm_training_toolkit.serving.batcher import ResponseStream
from llm_training_toolkit.serving.response_body import DONE_EVENT, ResponseWriter, build_usage, format_event

Result = TypeVar("Result")


class ModelResponse:
    """Answer in parts. `parser`: of a chat answer, None for a text completion."""

    def __init__(self, stream: ResponseStream, parser: ReplyParser | None, model: str, prompt_tokens: int) -> None:
        self._stream, self._parser, self._prompt_tokens = stream, parser, prompt_tokens
        self._writer = ResponseWriter(model, chat=parser is not None)

    async def collect(self) -> dict[str, Any]:
        """Return the whole answer as a JSON object. Raises ApiError."""
        parts = [part async for part in self.iter_parts()]
        if self._parser is not None:
            return self._writer.build_chat(parts, self._reason, self._usage)
        return self._writer.build_completion("".join(part.content for part in parts), self._reason, self._usage)

    async def iter_parts(self) -> AsyncIterator[ReplyPart]:
        """Yield the parts of the answer. Raises ApiError."""
        try:
            async for piece in self._stream.iter_pieces():
                for part in [ReplyPart(piece)] if self._parser is None else self._parser.push_text(piece):
                    yield part
            for part in () if self._parser is None else self._parser.finish():
                yield part
        finally:
            self._stream.cancel()

    async def iter_events(
        self, first: ReplyPart | None, rest: AsyncIterator[ReplyPart], *, usage: bool
    ) -> AsyncIterator[str]:
        """Yield the answer as server-sent events, from its first part on; an error becomes the last event."""
        try:
            if self._parser is not None:
                yield format_event(self._writer.build_first_chunk())
            if first is not None:
                yield format_event(self._build_chunk(first))
                async for part in rest:
                    yield format_event(self._build_chunk(part))
            yield format_event(self._writer.build_last_chunk(self._reason))
            if usage:
                yield format_event(self._writer.build_usage_chunk(self._usage))
            yield DONE_EVENT
        except ApiError as error:
            yield format_event(error.to_json())
        finally:
            self._stream.cancel()

    def _build_chunk(self, part: ReplyPart) -> dict[str, Any]:
        return (
            self._writer.build_text_chunk(part.content) if self._parser is None else self._writer.build_part_chunk(part)
        )

    @property
    def _reason(self) -> str:
        if self._parser is not None and self._parser.calls:
            return "tool_calls"
        assert self._stream.end is not None, "the parts have been read"
        return self._stream.end.reason

    @property
    def _usage(self) -> dict[str, int]:
        assert self._stream.end is not None, "the parts have been read"
        return build_usage(self._prompt_tokens, self._stream.end.new_tokens)


async def run_while_connected(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """Return the result of `work`. Cancels it and raises ClientDisconnect once the client has left.

    The body must have been read: the next message of the client is that it leaves.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_wait_for_disconnect(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
