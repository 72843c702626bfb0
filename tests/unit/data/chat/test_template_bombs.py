"""Chat templates made to run for ever or to take all memory: refused in words."""

from __future__ import annotations

import time

import pytest

from llm_training_toolkit.data.chat.template import ChatTemplate
from llm_training_toolkit.data.chat.template_trace import build_jinja_environment
from llm_training_toolkit.errors import DataError

TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
MARKERS = ["<|im_start|>", "<|im_end|>"]
BOMBS = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "loop under another name": "{% set counted_step = 1 %}"
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "product": "{% set x = 'a' * 9999999999 %}",
    "product of a list": "{% set x = 9999999999 * [0] %}",
    "power": "{% set x = 9 ** 999999999 %}",
    "doubled by ~": "{% set n = namespace(x='ab') %}{% for a in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "doubled by +": "{% set n = namespace(x='ab') %}{% for a in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_bomb_is_refused_in_words(kind: str) -> None:
    began = time.monotonic()
    with pytest.raises(DataError, match=r"cannot write this: it (takes|makes|raises)"):
        ChatTemplate(BOMBS[kind] + TURNS + PROMPT, MARKERS, {})
    assert time.monotonic() - began < 30, "seconds, on a slow machine"


def test_operators_do_what_they_do_elsewhere() -> None:
    source = "{{ 'a' ~ 1 ~ none ~ [2] }} {{ 'a' + 'b' }} {{ [1] + [2] }} {{ '-' * 3 }} {{ 2 ** 3 }} {{ 1.5 + 2 }}"
    macro = (
        "{% macro f(x) %}<{{ x }}>{% endmacro %}{{ f(1) }}{% for a in [1, 2] if a > 1 %}{{ loop.index }}{% endfor %}"
    )
    assert build_jinja_environment().from_string(source + macro).render() == "a1None[2] ab [1, 2] --- 8 3.5<1>1"


def test_a_long_conversation_in_a_quadratic_template_is_no_bomb() -> None:
    source = "{% for m in messages %}{% for other in messages %}{% endfor %}{{ m }}{% endfor %}"
    environment = build_jinja_environment()
    environment.reset_steps(600)
    assert environment.from_string(source).render(messages=["x"] * 600) == "x" * 600
