"""Checks of a request before its body is understood: the key, the sender's page, the size."""

from __future__ import annotations

import hmac

from starlette.requests import Request

from llm_training_toolkit.serving.api_error import ApiError
from llm_training_toolkit.serving.settings import is_loopback


def check_access(request: Request, key: str | None) -> None:
    """Raise ApiError 401 without the key.

    Without a key the server is on loopback, and a page in this machine's browser could reach it. Then requests must be
    for a loopback name (403, against DNS rebinding), and bodies must be declared as JSON (400): browsers ask the server
    before they send those for a foreign page, and get no permission.
    """
    if key is not None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
        if not hmac.compare_digest(given.encode(), key.encode()):
            what = "no key" if not given else "another key"
            raise ApiError(401, "invalid_api_key", f"{what}: send `Authorization: Bearer KEY` with the server's key")
        return
    if not is_loopback(request.url.hostname or ""):
        raise ApiError(403, "foreign_host", f"{request.url.hostname}: without a key only loopback names are served")
    if request.method == "POST" and not request.headers.get("content-type", "").startswith("application/json"):
        raise ApiError(400, "invalid_content_type", "send the header `Content-Type: application/json`")


async def read_body(request: Request, limit: int) -> bytes:
    """Return the body. Raises ApiError 413 for more than `limit` bytes, most of them unread."""
    content = bytearray()
    async for chunk in request.stream():
        content += chunk
        if len(content) > limit:
            raise ApiError(413, "request_too_large", f"the body has more than {limit:,} bytes, the most accepted")
    return bytes(content)
