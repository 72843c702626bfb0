"""The documentation as a site: built strictly, opened and searched in a real Chromium."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from photograph import Page, browser, photograph

pytestmark = [pytest.mark.slow]
ROOT = Path(__file__).parents[2]
SEARCH = """
const field = document.querySelector('input[data-md-component="search-query"]');
field.focus(); field.value = "micro_batch_size"; field.dispatchEvent(new KeyboardEvent("keyup", {bubbles: true}));
"""
FOUND = """
const found = [...document.querySelectorAll(".md-search-result__link")].map(link => link.getAttribute("href"));
if (!found.some(address => address.includes("configuration.html"))) throw Error(`found ${found}`);
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    built = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(built)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return built


def test_site_has_every_page_and_the_files_that_they_link_to(site: Path) -> None:
    pages = {path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")}
    assert pages <= {path.relative_to(site) for path in site.rglob("*.html")}
    assert '"../pictures/' in (site / "tutorials" / "qwen-chat.html").read_text()
    assert "make_plan" in (site / "api.html").read_text()
    assert "RayCluster" in (site / "repository/cluster/kuberay-cluster.yaml.html").read_text()


@pytest.mark.skipif(browser() is None, reason="no Chromium on this machine")
def test_site_is_searched_in_a_browser(site: Path, tmp_path: Path) -> None:
    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/index.html"
        photograph(Page(address, seconds=6.0, scripts=[SEARCH, FOUND]), tmp_path / "found.png")
        server.shutdown()
