"""Chat templates of the families, for tokenizers without one: Jinja, as read by transformers and other engines.

Qwen's templates produce the output of Qwen's own tokenizers. StarCoder's base tokenizers have no chat tokens, so their
template is plain text, after starcoder2-self-align.
"""

from __future__ import annotations

_TOOLS = r"""
{%- macro write_tools() %}
    {{- '# Tools\n\nYou may call one or more functions to assist with the user query.\n\n' }}
    {{- 'You are provided with function signatures within <tools></tools> XML tags:\n<tools>' }}
    {%- for tool in tools %}
        {{- '\n' + (tool | tojson) }}
    {%- endfor %}
    {{- '\n</tools>\n\nFor each function call, return a json object with function name and arguments ' }}
    {{- 'within <tool_call></tool_call> XML tags:\n<tool_call>\n' }}
    {{- '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>' }}
{%- endmacro %}
{%- macro write_calls(message, before) %}
    {%- for call in message.tool_calls or [] %}
        {%- set call = call.function or call %}
        {{- before if loop.first else '\n' }}
        {{- '<tool_call>\n{"name": "' + call.name + '", "arguments": ' }}
        {{- call.arguments if call.arguments is string else (call.arguments | tojson) }}
        {{- '}\n</tool_call>' }}
    {%- endfor %}
{%- endmacro %}
{%- macro write_result(message, first, last) %}
    {{- '<|im_start|>user' if first }}
    {{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
    {{- '<|im_end|>\n' if last }}
{%- endmacro %}
{%- set given = messages[0].role == 'system' %}
"""
# End of the loop over messages, after the assistant's message.
_OTHERS = r"""
    {%- elif message.role == 'tool' %}
        {%- set first = loop.first or messages[loop.index0 - 1].role != 'tool' %}
        {{- write_result(message, first, loop.last or messages[loop.index0 + 1].role != 'tool') }}
    {%- elif not (loop.first and given) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
"""

_CHATML = r"""
{{- '<|im_start|>system\n' + (messages[0].content if given else 'DEFAULT SYSTEM TEXT') }}
{{- '\n\n' + write_tools() if tools }}
{{- '<|im_end|>\n' }}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\n' + message.content }}
        {{- write_calls(message, '\n' if message.content else '') }}
        {{- '<|im_end|>\n' }}
OTHERS
{{- '<|im_start|>assistant\n' if add_generation_prompt }}
"""

# Answers to the last question keep their thinking; the last message has an (empty) think block in any case. A user
# message that is a tagged tool result is not a question.
_QWEN3 = r"""
{{- '<|im_start|>system\n' if given or tools }}
{{- messages[0].content + ('\n\n' if tools else '') if given }}
{{- write_tools() if tools }}
{{- '<|im_end|>\n' if given or tools }}
{%- set last = namespace(question=messages | length - 1, sought=true) %}
{%- for message in messages[::-1] %}
    {%- set result = message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>') %}
    {%- if last.sought and message.role == 'user' and not result %}
        {%- set last.question = messages | length - loop.index %}
        {%- set last.sought = false %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- set content = message.content %}
        {%- set thinking = '' %}
        {%- if message.reasoning_content is string %}
            {%- set thinking = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thinking = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- set thinks = loop.index0 > last.question and (loop.last or thinking) %}
        {{- '<|im_start|>assistant\n' }}
        {{- '<think>\n' + thinking.strip('\n') + '\n</think>\n\n' if thinks }}
        {{- content.lstrip('\n') if thinks else content }}
        {{- write_calls(message, '\n' if content else '') }}
        {{- '<|im_end|>\n' }}
OTHERS
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {{- '<think>\n\n</think>\n\n' if enable_thinking is defined and enable_thinking is false }}
{%- endif %}
"""

_PLAIN = r"""
{%- if tools %}
    {{- raise_exception('has no form for tools') }}
{%- endif %}
{%- for message in messages %}
    {%- if message.tool_calls or message.role == 'tool' %}
        {{- raise_exception('has no form for tools') }}
    {%- elif message.role == 'system' %}
        {{- message.content + '\n\n' if message.content }}
    {%- elif message.role == 'user' %}
        {{- '### Instruction\n' + message.content + '\n\n' }}
    {%- else %}
        {{- '### Response\n' + message.content + '<|endoftext|>' }}
    {%- endif %}
{%- endfor %}
{{- '### Response\n' if add_generation_prompt }}
"""


def _build_qwen_template(turns: str) -> str:
    return (_TOOLS.strip("\n") + turns.replace("OTHERS", _OTHERS.strip("\n"))).rstrip("\n")


def _build_chatml_template(system: str) -> str:
    """Return ChatML with a default system prompt."""
    return _build_qwen_template(_CHATML.replace("DEFAULT SYSTEM TEXT", system))


QWEN2 = _build_chatml_template("You are a helpful assistant.")
QWEN2_5 = _build_chatml_template("You are Qwen, created by Alibaba Cloud. You are a helpful assistant.")
QWEN3 = _build_qwen_template(_QWEN3)
STARCODER = _PLAIN.strip("\n")
