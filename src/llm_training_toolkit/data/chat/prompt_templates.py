"""Chat templates for question and answer data: Alpaca's, StarChat's, StarCoder's, or a text of one's own.

Sources: `alpaca`: Stanford Alpaca, train.py. `starchat`: bigcode-project/starcoder, chat/dialogues.py, without a system
text by default. `starcoder`: bigcode-project/starcoder, finetune/finetune.py.
"""

from __future__ import annotations

import re

_TEXT_TEMPLATES = {"starcoder": "Question: {prompt}\n\nAnswer: {completion}"}
_STARCHAT_MARKERS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")

_NO_TOOLS = r"""
{%- if tools %}
    {{- raise_exception('has no form for tools') }}
{%- endif %}
{%- for message in messages %}
    {%- if message.tool_calls or message.role == 'tool' %}
        {{- raise_exception('has no form for tools') }}
"""

_ALPACA = (
    _NO_TOOLS
    + r"""
    {%- elif message.role == 'system' %}
        {{- message.content + '\n\n' if message.content }}
    {%- elif message.role == 'user' %}
        {%- if loop.first %}
            {{- 'Below is an instruction that describes a task' }}
            {{- ', paired with an input that provides further context' if message.context }}
            {{- '. Write a response that appropriately completes the request.\n\n' }}
        {%- endif %}
        {{- '### Instruction:\n' + message.content + '\n\n' }}
        {{- '### Input:\n' + message.context + '\n\n' if message.context }}
    {%- else %}
        {{- '### Response:' + message.content + END_OF_TEXT }}
    {%- endif %}
{%- endfor %}
{{- '### Response:' if add_generation_prompt }}
"""
)

_STARCHAT = r"""
{%- if tools %}
    {{- raise_exception('has no form for tools') }}
{%- endif %}
{{- '<|system|>\n<|end|>\n' if messages[0].role != 'system' }}
{%- for message in messages %}
    {%- if message.tool_calls or message.role == 'tool' %}
        {{- raise_exception('has no form for tools') }}
    {%- elif message.role == 'system' %}
        {{- '<|system|>\n' + message.content + '<|end|>\n' }}
    {%- elif message.role == 'user' %}
        {{- '<|user|>\n' + message.content + '<|end|>\n' }}
    {%- else %}
        {{- '<|assistant|>\n' + message.content + '<|end|>\n' }}
    {%- endif %}
{%- endfor %}
{{- '<|assistant|>\n' if add_generation_prompt }}
"""

_TEXT = (
    _NO_TOOLS
    + r"""
    {%- elif message.role == 'system' %}
        {{- message.content + '\n\n' if message.content }}
    {%- elif message.role == 'user' %}
        {{- PROMPT }}
    {%- else %}
        {{- HEADER + message.content + TAIL + END_OF_TEXT }}
    {%- endif %}
{%- endfor %}
{{- HEADER if add_generation_prompt }}
"""
)


def build_jinja_template(prompt_template: str, end_of_text: str) -> str:
    """Return the Jinja chat template of a named or textual prompt template.

    An answer ends with `end_of_text`, or with StarChat's `<|end|>`. The text between the last placeholder of the prompt
    and `{completion}` is the header of an answer.
    """
    if prompt_template == "starchat":
        return _STARCHAT.strip("\n")
    if prompt_template == "alpaca":
        return _fill(_ALPACA, END_OF_TEXT=_quote(end_of_text))
    text = _TEXT_TEMPLATES.get(prompt_template, prompt_template)
    before, _, tail = text.partition("{completion}")
    *_, last = re.finditer(r"\{(?:prompt|context)\}", before)
    return _fill(
        _TEXT,
        PROMPT=_build_prompt_expression(before[: last.end()]),
        HEADER=_quote(before[last.end() :]),
        TAIL=_quote(tail),
        END_OF_TEXT=_quote(end_of_text),
    )


def has_context(prompt_template: str | None) -> bool:
    """Return whether a template writes the context of a prompt in a place of its own."""
    return prompt_template == "alpaca" or "{context}" in (prompt_template or "")


def get_required_markers(prompt_template: str | None) -> tuple[str, ...]:
    """Return the special tokens that a template needs besides the family's."""
    return _STARCHAT_MARKERS if prompt_template == "starchat" else ()


def _build_prompt_expression(text: str) -> str:
    """Return the Jinja expression of a text with `{prompt}` and `{context}`."""
    values = {"{prompt}": "message.content", "{context}": "(message.context or '')"}
    parts = re.split(r"(\{(?:prompt|context)\})", text)
    return " + ".join(values.get(part) or _quote(part) for part in parts if part)


def _fill(template: str, **expressions: str) -> str:
    names = re.compile("|".join(expressions))
    return names.sub(lambda found: expressions[found.group()], template).strip("\n")


def _quote(text: str) -> str:
    """Return a Jinja string literal."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\r", "\\r")
    return f"'{escaped}'"
