"""The page for chat and infilling, in a real Chromium."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

import pytest

from llm_training_toolkit.models.sampling import SamplingParams
from photograph import Page, browser, photograph
from served import KEY, Served

CHAT = """
if (!messages.length && !running) { at("tokens").value = 9; at("question").value = "What is an area?"; send(); }
if (!messages.length || running) throw Error(`no answer yet: ${at("problem").textContent}`);
"""
INFILL = """
select("infill");
if (!at("result").textContent && !running) { at("prefix").value = PREFIX; at("suffix").value = SUFFIX; fill(); }
if (running || at("result").textContent !== PREFIX + MIDDLE + SUFFIX) throw Error(at("result").textContent);
"""
PREFIX, SUFFIX = "def area(width, height):\n", "\n    return area\n"


def test_the_page_loads_nothing_from_elsewhere_and_needs_no_key(served: Served) -> None:
    with urllib.request.urlopen(served.url) as response:
        page = response.read().decode()
        policy = response.headers["Content-Security-Policy"]
    assert "connect-src 'self'" in policy
    assert "http" not in page.replace("http-equiv", "")
    assert KEY not in page


@pytest.mark.slow
@pytest.mark.skipif(browser() is None, reason="no Chromium on this machine")
def test_a_person_chats_and_infills_on_the_page(served: Served, tmp_path: Path) -> None:
    middle = served.generator.fill_middle(PREFIX, SUFFIX, SamplingParams(max_new_tokens=9)).text
    infill = INFILL
    for name, text in {"PREFIX": PREFIX, "SUFFIX": SUFFIX, "MIDDLE": middle}.items():
        infill = infill.replace(name, json.dumps(text))
    page = Page(f"{served.url}/#key={KEY}", seconds=1.0, scripts=[CHAT, infill])
    photograph(page, tmp_path / "page.png")
