"""Open a page in a real Chromium, let it draw, do what a person would click, and save what it shows.

Speaks the DevTools protocol over the web socket that Chromium opens; aiohttp comes with Ray.
"""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import aiohttp

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@dataclass(frozen=True)
class Page:
    """What to open and how."""

    address: str
    size: tuple[int, int] = (1300, 900)
    seconds: float = 8.0
    """Time to draw before the scripts, and half of it after them."""
    scripts: Sequence[str] = ()
    """JavaScript that clicks or removes what is in the way. One that throws is repeated."""
    patience: float = 30.0
    """Seconds until a script that still throws is an error."""
    colours: Literal["light", "dark"] = "light"
    """Scheme that the page is told the reader prefers."""


def browser() -> str | None:
    """The path of a Chromium; None where there is none."""
    return next((found for name in BROWSERS if (found := shutil.which(name))), None)


def photograph(page: Page, picture: Path) -> None:
    """Save a picture of the page as PNG. Raises SystemExit for a script that fails and for errors on the page."""
    found = browser()
    if found is None:
        raise SystemExit(f"no browser found ({', '.join(BROWSERS)}): install Chromium")
    picture.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-port=0"]
        options += [f"--user-data-dir={profile}", f"--window-size={page.size[0]},{page.size[1]}", "about:blank"]
        with subprocess.Popen([found, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            try:
                asyncio.run(_drive(Path(profile), page, picture))
            finally:
                process.terminate()


async def _drive(profile: Path, page: Page, picture: Path) -> None:
    async with aiohttp.ClientSession() as session:
        port = await _port(profile)
        async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
            target = next(each for each in await answer.json() if each["type"] == "page")
        async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
            wire = _Wire(socket)
            await wire.ask("Runtime.enable")
            scheme = [{"name": "prefers-color-scheme", "value": page.colours}]
            await wire.ask("Emulation.setEmulatedMedia", features=scheme)
            await wire.ask("Page.navigate", url=page.address)
            await asyncio.sleep(page.seconds)
            for script in page.scripts:
                until, block = time.monotonic() + page.patience, f"{{{script}}}"  # a block may declare its names again
                while "exceptionDetails" in (done := await wire.ask("Runtime.evaluate", expression=block)):
                    if time.monotonic() > until:
                        raise SystemExit(f"{page.address}: {script}: {_describe_exception(done)}")
                    await asyncio.sleep(0.5)  # a busy machine draws late
                await asyncio.sleep(page.seconds / 2)
            shot = await wire.ask("Page.captureScreenshot", format="png")
            picture.write_bytes(base64.b64decode(shot["data"]))
            if wire.errors:
                raise SystemExit(f"{page.address}: errors on the page: {'; '.join(wire.errors)}")


def _describe_exception(done: dict[str, Any]) -> str:
    """What a script threw, in words."""
    details = done["exceptionDetails"]
    return str(details.get("exception", {}).get("description", details["text"]))


async def _port(profile: Path, seconds: float = 30) -> int:
    """The port that Chromium has chosen."""
    file = profile / "DevToolsActivePort"
    for _ in range(int(seconds * 10)):
        if file.exists() and (lines := file.read_text().splitlines()):
            return int(lines[0])
        await asyncio.sleep(0.1)
    raise SystemExit(f"the browser did not start within {seconds:g} s")


class _Wire:
    """Questions to the page and their answers; errors of the page's console are kept on the way."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._number = 0
        self.errors: list[str] = []

    async def ask(self, method: str, **parameters: object) -> dict[str, Any]:
        self._number += 1
        await self._socket.send_str(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while True:
            message = await self._socket.receive_json()
            if message.get("id") == self._number:
                if "error" in message:
                    raise SystemExit(f"{method}: {message['error']['message']}")
                result: dict[str, Any] = message["result"]
                return result
            if message.get("method") == "Runtime.exceptionThrown":
                self.errors.append(json.dumps(message["params"]["exceptionDetails"]))
