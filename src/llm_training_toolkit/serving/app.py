"""ASGI application of the server: routes, errors as OpenAI's objects, the page."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib import resources
from typing import TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from llm_training_toolkit.generation.reply_parser import ReplyParser
from llm_training_toolkit.serving.access import check_access, read_body
from llm_training_toolkit.serving.api_error import ApiError
from llm_training_toolkit.serving.batcher import Batcher, QueuedRow, ResponseStream
from llm_training_toolkit.serving.model_response import ModelResponse, run_while_connected
from llm_training_toolkit.serving.request_body import ChatBody, CompletionBody, GenerationBody, parse_body
from llm_training_toolkit.serving.served_model import ServedModel, ServedPrompt
from llm_training_toolkit.serving.settings import ServingSettings

_BYTES_PER_TOKEN = 64  # accepted per token of context: far above the 2 to 5 of code and prose, with JSON's escapes
_LEAST_BODY_BYTES = 1 << 20
_CLIENT_LEFT = 499  # nginx's status for logs; nobody receives it
# The page runs its own script alone and asks no other server; no page may frame it.
_PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
Body = TypeVar("Body", bound=GenerationBody)
Result = TypeVar("Result")


def build_app(model: ServedModel, settings: ServingSettings) -> Starlette:
    """Return the application, whose generating thread runs from now until the application's shutdown."""
    server = _Server(model, settings)
    routes = [
        Route("/", server.show_page),
        Route("/health", server.show_health),
        Route("/v1/models", server.list_models),
        Route("/v1/models/{name:path}", server.show_model),
        Route("/v1/completions", server.complete_text, methods=["POST"]),
        Route("/v1/chat/completions", server.complete_chat, methods=["POST"]),
    ]
    handlers = {
        ApiError: _respond_to_api_error,
        HTTPException: _respond_to_http_error,
        ClientDisconnect: _respond_to_nobody,
        Exception: _respond_to_unknown_error,
    }
    return Starlette(routes=routes, exception_handlers=handlers, lifespan=server.live)


class _Server:
    """Endpoints. All of /v1 need the key; the page and the health do not."""

    def __init__(self, model: ServedModel, settings: ServingSettings) -> None:
        self._model, self._key, self._limits = model, settings.key, settings.limits
        self._batcher = Batcher(model.generator, settings.limits)
        self._page = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
        self._body_limit = max(_LEAST_BODY_BYTES, _BYTES_PER_TOKEN * model.generator.context_length)
        self._created = int(time.time())

    @asynccontextmanager
    async def live(self, _app: Starlette) -> AsyncIterator[None]:
        """Stop generating when the server ends."""
        yield
        self._batcher.close()

    async def show_page(self, _request: Request) -> Response:
        """Return the page for chat and infilling; it asks for the key."""
        return HTMLResponse(self._page, headers={"Content-Security-Policy": _PAGE_POLICY})

    async def show_health(self, _request: Request) -> Response:
        """Return 200 while requests are answered, 503 otherwise."""
        alive = self._batcher.is_alive
        state = {"status": "ok" if alive else "stopped", **self._batcher.count_requests()}
        return JSONResponse(state, status_code=200 if alive else 503)

    async def list_models(self, request: Request) -> Response:
        """Return the list of models, which has one."""
        check_access(request, self._key)
        return JSONResponse({"object": "list", "data": [self._build_model_object()]})

    async def show_model(self, request: Request) -> Response:
        """Return the model of a name."""
        check_access(request, self._key)
        self._check_model_name(request.path_params["name"])
        return JSONResponse(self._build_model_object())

    async def complete_text(self, request: Request) -> Response:
        """Continue a text, or fill the gap before a suffix."""
        return await self._generate_response(request, CompletionBody, self._model.tokenize_completion, None)

    async def complete_chat(self, request: Request) -> Response:
        """Answer a conversation."""

        def build_parser(body: ChatBody, prompt: ServedPrompt) -> ReplyParser:
            offered = bool(body.tools) and body.tool_choice != "none"
            return ReplyParser(tools=offered, thinking=prompt.opens_thinking)

        return await self._generate_response(request, ChatBody, self._model.tokenize_chat, build_parser)

    async def _generate_response(
        self,
        request: Request,
        kind: type[Body],
        tokenize: Callable[[Body], ServedPrompt],
        build_parser: Callable[[Body, ServedPrompt], ReplyParser] | None,
    ) -> Response:
        deadline = asyncio.get_running_loop().time() + self._limits.timeout
        check_access(request, self._key)
        body = parse_body(await self._read_body(request, deadline), kind)
        self._check_model_name(body.model)
        self._batcher.check_room()  # before a long prompt is tokenized
        prompt = await asyncio.to_thread(tokenize, body)
        new_tokens = self._model.compute_new_tokens(prompt, body.asked_tokens, self._limits.max_tokens)
        stream = ResponseStream(self._limits.timeout, deadline)
        how = body.build_sampling_params(new_tokens)
        self._batcher.submit(QueuedRow(prompt.tokens, how, stream, body.stops, prompt.written_ids))
        parser = None if build_parser is None else build_parser(body, prompt)
        model_response = ModelResponse(stream, parser, self._model.name, len(prompt.tokens.ids))
        try:
            return await self._respond(request, model_response, body)
        except BaseException:  # also a cancelled request, before anything has been read
            stream.cancel()
            raise

    async def _read_body(self, request: Request, deadline: float) -> bytes:
        try:
            async with asyncio.timeout_at(deadline):
                return await read_body(request, self._body_limit)
        except TimeoutError as error:
            message = f"the body did not arrive within the server's limit of {self._limits.timeout:g} s"
            raise ApiError(408, "request_timeout", message) from error

    async def _respond(self, request: Request, model_response: ModelResponse, body: GenerationBody) -> Response:
        if not body.stream:
            return JSONResponse(await run_while_connected(request, model_response.collect()))
        parts = model_response.iter_parts()
        first = await run_while_connected(request, _read_first(parts))  # its errors still have a status of their own
        events = model_response.iter_events(first, parts, usage=body.wants_usage)
        return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    def _check_model_name(self, name: str) -> None:
        if name != self._model.name:
            message = f"{name}: no such model here; this server has {self._model.name}"
            raise ApiError(404, "model_not_found", message, "model")

    def _build_model_object(self) -> dict[str, object]:
        base = {"id": self._model.name, "object": "model", "created": self._created, "owned_by": "ltt"}
        return base | self._model.describe_features()


async def _read_first(parts: AsyncIterator[Result]) -> Result | None:
    return await anext(parts, None)


async def _respond_to_api_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.to_json(), status_code=error.status, headers=error.headers)


async def _respond_to_http_error(request: Request, error: Exception) -> Response:
    """Answer an unknown path (404) or method (405)."""
    assert isinstance(error, HTTPException)
    code = "unknown_url" if error.status_code == 404 else "invalid_method"
    api_error = ApiError(error.status_code, code, f"{request.method} {request.url.path}: {error.detail}")
    return JSONResponse(api_error.to_json(), status_code=error.status_code, headers=error.headers)


async def _respond_to_nobody(_request: Request, _error: Exception) -> Response:
    return Response(status_code=_CLIENT_LEFT)


async def _respond_to_unknown_error(_request: Request, _error: Exception) -> Response:
    error = ApiError(500, "internal_error", "the server failed; its log has the reason")
    return JSONResponse(error.to_json(), status_code=500)
