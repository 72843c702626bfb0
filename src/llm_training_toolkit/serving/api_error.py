"""Errors of the API: OpenAI's error object with its HTTP status.

Shape and codes follow https://platform.openai.com/docs/guides/error-codes, on which clients base their retries.
"""

from __future__ import annotations

from typing import Any


class ApiError(Exception):
    """Refusal of a request. `code` is stable; `param` is the field of the request at fault."""

    def __init__(self, status: int, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.param = status, code, message, param

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the response."""
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        return {"Retry-After": "1"} if self.status in {429, 503} else {}

    def to_json(self) -> dict[str, Any]:
        """Return OpenAI's error object."""
        kind = "rate_limit_error" if self.status == 429 else "server_error"
        return {
            "error": {
                "message": self.message.encode(errors="replace").decode(),  # it may quote half a surrogate pair
                "type": "invalid_request_error" if self.status < 429 else kind,
                "param": self.param,
                "code": self.code,
            }
        }
