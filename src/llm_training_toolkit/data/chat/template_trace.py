"""Traced rendering of a chat template: separates its own markers from message text and maps text to messages.

A template is a program. Its output alone does not distinguish its own markers from the same characters in a message.
The traced program writes a stand-in for each marker in its texts: a code point that no text can contain.
Each iteration of a loop over the messages first writes the message's number. The original program runs as well, and
both outputs must be equal.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.visitor import NodeTransformer

from llm_training_toolkit.data.chat.bounded_environment import BoundedEnvironment
from llm_training_toolkit.errors import DataError

# Signs are surrogates: UTF-8 cannot encode them, so they are absent from records.
MESSAGE_SIGN, MESSAGE_SIGN_END = "\ud800", "\ud801"  # around the number of a loop's current message
GENERATION_SIGN, GENERATION_SIGN_END = "\ud802", "\ud803"  # around the output of a `{% generation %}` block
MESSAGE_SIGN_FUNCTION = "ltt_number_of"  # function that a traced template calls on a loop item; returns its sign or ""
_FIRST_STAND_IN, _LAST_STAND_IN = 0xD810, 0xDFFF
_SIGNS = re.compile(
    f"({MESSAGE_SIGN}\\d+{MESSAGE_SIGN_END}|[{GENERATION_SIGN}{GENERATION_SIGN_END}{chr(_FIRST_STAND_IN)}-{chr(_LAST_STAND_IN)}])"
)
_MASK_CHARACTER = "?"
_FAILURES = (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError)
# Methods whose arguments are searched for in a text rather than written.
_SEARCH_METHODS = re.compile(
    "(starts|ends)with|r?(split|partition|find|index)|[lr]?strip|count|replace|remove(prefix|suffix)"
)


@dataclass(frozen=True)
class TracedText:
    """Output of a template for some messages.

    `markers`: spans [start, stop) of its own markers. `message_spans`: last span that a loop wrote for each message,
    the final one up to the end of the text. `generation_spans`: `{% generation %}` blocks.
    """

    text: str
    markers: tuple[tuple[int, int], ...]
    message_spans: Mapping[int, tuple[int, int]]
    generation_spans: tuple[tuple[int, int], ...]


class TracedTemplate:
    """Hugging Face chat template that traces the origin of its output."""

    def __init__(self, source: str, markers: Sequence[str], variables: Mapping[str, str]) -> None:
        """Compile a template for a tokenizer's special tokens (`markers`) and variables such as `eos_token`.

        Raises DataError for a template that cannot be compiled.
        """
        longest_first = sorted(filter(None, markers), key=len, reverse=True)
        self.marker_pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._marker_by_sign: dict[str, str] = {}
        self._variables = dict(variables)
        self._replaced_variables = {name: self._replace_markers(value) for name, value in variables.items()}
        try:
            self._plain = build_jinja_environment().from_string(source)
            self._traced = compile_traced_template(source, self._replace_markers)
        except _FAILURES as error:
            raise DataError(f"cannot be compiled: {error}") from error

    def render_messages(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] = (), *, prompt: bool = False
    ) -> TracedText:
        """Render messages; with `prompt`, add the header of the assistant's next turn.

        Raises DataError with the template's own reason if it rejects them, and if its output cannot be traced.
        """
        written, unclear = self._resolve_signs(self._render_template(self._traced, messages, tools, prompt=prompt))
        plain = self._render_template(self._plain, messages, tools, prompt=prompt)
        if written.text != _SIGNS.sub("", plain):  # plain output has {% generation %} signs
            raise DataError("looks into messages for special tokens in a way that cannot be followed")
        if unclear:
            # Markers that the template concatenates ('<|' + role + '|>') are its own, too.
            own = self._find_own_markers([list(messages), list(tools)], written.text, unclear, prompt=prompt)
            return replace(written, markers=tuple(sorted((*written.markers, *own))))
        return written

    def _find_own_markers(
        self, given: list[Any], text: str, unclear: list[tuple[int, int]], *, prompt: bool
    ) -> list[tuple[int, int]]:
        """Return those of the `unclear` spans whose marker the template itself wrote."""
        disarmed = self._mask_markers(given)
        if disarmed == given:
            return unclear
        other, own = self._resolve_signs(self._render_template(self._traced, *disarmed, prompt=prompt))
        pairs = zip(text, other.text, strict=False)
        same = len(text) == len(other.text) and all(there in {here, _MASK_CHARACTER} for here, there in pairs)
        if own and not same:
            raise DataError("puts special tokens together from pieces, and a message holds the text of one")
        return own

    def _replace_markers(self, text: str) -> str:
        return self.marker_pattern.sub(lambda found: self._get_stand_in(found.group()), text)

    def _get_stand_in(self, marker: str) -> str:
        for sign, meant in self._marker_by_sign.items():
            if meant == marker:
                return sign
        sign = chr(_FIRST_STAND_IN + len(self._marker_by_sign))
        assert ord(sign) <= _LAST_STAND_IN, "a template with two thousand kinds of markers"
        self._marker_by_sign[sign] = marker
        return sign

    def _render_template(
        self, template: Template, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any], *, prompt: bool
    ) -> str:
        numbers = {id(message): f"{MESSAGE_SIGN}{number}{MESSAGE_SIGN_END}" for number, message in enumerate(messages)}
        variables: dict[str, Any] = dict(self._variables)
        if template is self._traced:
            variables = {**self._replaced_variables, MESSAGE_SIGN_FUNCTION: lambda each: numbers.get(id(each), "")}
        assert isinstance(template.environment, BoundedEnvironment)
        template.environment.reset_steps(len(messages))
        try:
            return template.render(
                messages=list(messages),
                tools=list(tools) or None,
                documents=None,
                add_generation_prompt=prompt,
                **variables,
            )
        except _FAILURES as error:
            raise DataError(f"cannot write this: {error}") from error

    def _resolve_signs(self, rendered: str) -> tuple[TracedText, list[tuple[int, int]]]:
        """Resolve signs into spans. Return the text, and the spans of markers written without a sign."""
        reading = _TraceReader()
        unclear: list[tuple[int, int]] = []
        for number, piece in enumerate(_SIGNS.split(rendered)):
            if number % 2:
                reading.resolve_sign(piece, self._marker_by_sign)
            else:
                unclear += [
                    (reading.length + m.start(), reading.length + m.end()) for m in self.marker_pattern.finditer(piece)
                ]
                reading.append_text(piece)
        return reading.build_traced_text(), unclear

    def _mask_markers(self, value: Any) -> Any:  # noqa: ANN401 - JSON
        """Return the same values with all markers masked, including those in mapping keys."""
        if isinstance(value, str):
            return self.marker_pattern.sub(lambda found: _MASK_CHARACTER * len(found.group()), value)
        if isinstance(value, Mapping):
            return {self._mask_markers(key): self._mask_markers(each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [self._mask_markers(each) for each in value]
        return value


class _TraceReader:
    """Left-to-right reader of traced text."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.length = 0
        self.markers: list[tuple[int, int]] = []
        self.message_starts: list[tuple[int, int]] = []
        self.generation_spans: list[tuple[int, int]] = []
        self._generation_start = 0

    def append_text(self, text: str) -> None:
        self.texts.append(text)
        self.length += len(text)

    def resolve_sign(self, sign: str, meant: Mapping[str, str]) -> None:
        if sign in meant:
            self.markers.append((self.length, self.length + len(meant[sign])))
            self.append_text(meant[sign])
        elif sign[0] == MESSAGE_SIGN:
            self.message_starts.append((self.length, int(sign[1:-1])))
        elif sign == GENERATION_SIGN:
            self._generation_start = self.length
        else:
            self.generation_spans.append((self._generation_start, self.length))

    def build_traced_text(self) -> TracedText:
        text = "".join(self.texts)
        spans_by_message: dict[int, tuple[int, int]] = {}
        stops = [start for start, _ in self.message_starts[1:]] + [self.length]
        for (start, message), stop in zip(self.message_starts, stops, strict=False):
            # Of several loops over the messages, the last one with output writes the turns.
            if message not in spans_by_message or text[start:stop].strip():
                spans_by_message[message] = (start, stop)
        return TracedText(text, tuple(self.markers), spans_by_message, tuple(self.generation_spans))


def compile_traced_template(source: str, replaced: Callable[[str], str]) -> Template:
    """Compile a template that writes signs for the messages, with `replaced` applied to its own texts."""
    where = build_jinja_environment()
    tree = _TracingTransformer(replaced).visit(where.parse(source))
    tree.set_environment(where)
    return Template.from_code(where, where.compile(tree), where.make_globals(None))


class _TracingTransformer(NodeTransformer):
    """AST transformer that replaces markers in a template's texts and adds the message number to its loops.

    Texts that are only compared or searched for are unchanged.
    """

    def __init__(self, replaced: Callable[[str], str]) -> None:
        self._replace_markers = replaced

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:  # noqa: N802 - jinja2's names
        return nodes.TemplateData(self._replace_markers(node.data), lineno=node.lineno)

    def visit_Const(self, node: nodes.Const) -> nodes.Node:  # noqa: N802
        return (
            nodes.Const(self._replace_markers(node.value), lineno=node.lineno) if isinstance(node.value, str) else node
        )

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:  # noqa: N802
        return node

    def visit_Test(self, node: nodes.Test) -> nodes.Node:  # noqa: N802
        return node

    def visit_Call(self, node: nodes.Call) -> nodes.Node:  # noqa: N802
        called = node.node
        if isinstance(called, nodes.Getattr) and _SEARCH_METHODS.fullmatch(called.attr):
            node.node = self.visit(called)
            return node
        return self.generic_visit(node)

    def visit_Filter(self, node: nodes.Filter) -> nodes.Node:  # noqa: N802
        if node.name == "replace" and node.node is not None:
            node.node = self.visit(node.node)
            return node
        return self.generic_visit(node)

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802
        speaks = any(_has_visible_output(output) for output in node.find_all(nodes.Output))
        self.generic_visit(node)
        if speaks and isinstance(node.target, nodes.Name):
            line = node.lineno
            function, message = (
                nodes.Name(name, "load", lineno=line) for name in (MESSAGE_SIGN_FUNCTION, node.target.name)
            )
            number = nodes.Call(function, [message], [], None, None, lineno=line)
            node.body.insert(0, nodes.Output([number], lineno=line))
        return node


def _has_visible_output(output: nodes.Output) -> bool:
    return any(not isinstance(each, nodes.TemplateData) or each.data.strip() for each in output.nodes)


class _GenerationExtension(Extension):
    """Hugging Face's `{% generation %}` block around the assistant's text."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        begin, end = (
            nodes.Output([nodes.TemplateData(sign)], lineno=line) for sign in (GENERATION_SIGN, GENERATION_SIGN_END)
        )
        return [begin, nodes.Scope(body, lineno=line), end]


def build_jinja_environment() -> BoundedEnvironment:
    """Return the environment in which Hugging Face renders templates, bounded, without `strftime_now`.

    Tokens that depend on the current date are not reproducible. Templates with a fallback (Llama 3) use a fixed date.
    """
    environment = BoundedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationExtension, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    return environment


def _raise_exception(reason: str) -> None:
    raise TemplateError(reason)


def _to_json(
    value: Any,  # noqa: ANN401 - JSON
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return JSON without the HTML escapes of jinja2's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
