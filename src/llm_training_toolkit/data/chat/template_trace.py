"""Renders a chat template so that it is known which characters are its own markers, and which message wrote what.

A template is a program, and its output alone does not tell a marker that it wrote from the same characters in a
message. So the program is changed before it runs: where its text holds a marker, it holds a stand-in, a code point that
no text can contain, and every turn of a loop over the messages first writes which message it is at. The program as it
was runs as well, and the two must say the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jinja2 import Environment, Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from llm_training_toolkit.errors import DataError

# Signs are surrogates: code points that UTF-8 cannot express, so no record holds one.
AT, AT_END = "\ud800", "\ud801"
"""Around the number of the message that a loop is at."""
SAID, SAID_END = "\ud802", "\ud803"
"""Around what a `{% generation %}` block writes."""
NUMBER_OF = "ltt_number_of"
"""The function that a traced template calls with what a loop is at; it gives the sign, or nothing."""
_FIRST_STAND_IN, _LAST_STAND_IN = 0xD810, 0xDFFF
_SIGNS = re.compile(f"({AT}\\d+{AT_END}|[{SAID}{SAID_END}{chr(_FIRST_STAND_IN)}-{chr(_LAST_STAND_IN)}])")
_HARMLESS = "?"
_FAILURES = (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError)
_LOOKING = re.compile("(starts|ends)with|r?(split|partition|find|index)|[lr]?strip|count|replace|remove(prefix|suffix)")
"""Methods whose arguments are looked for in a text, and not written."""


@dataclass(frozen=True)
class Written:
    """What a template wrote for some messages.

    markers: where in the text its own markers stand, [start, stop). parts: for each message the last stretch of text
    that a loop wrote while it was at it; the last part goes on to the end of the text. said: what lies in
    `{% generation %}` blocks.
    """

    text: str
    markers: tuple[tuple[int, int], ...]
    parts: Mapping[int, tuple[int, int]]
    said: tuple[tuple[int, int], ...]


class TracedTemplate:
    """A chat template, as Hugging Face understands it, that tells where the characters it writes come from."""

    def __init__(self, source: str, markers: Sequence[str], variables: Mapping[str, str]) -> None:
        """Compile a template for a tokenizer with these special tokens and variables (`eos_token` and its like).

        Raises DataError for a template that cannot be compiled.
        """
        longest_first = sorted(filter(None, markers), key=len, reverse=True)
        self.marker = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._meant: dict[str, str] = {}
        self._variables = dict(variables)
        self._replaced_variables = {name: self._replaced(value) for name, value in variables.items()}
        try:
            self._plain = environment().from_string(source)
            self._traced = traced(source, self._replaced)
        except _FAILURES as error:
            raise DataError(f"cannot be compiled: {error}") from error

    def write(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] = (), *, prompt: bool = False
    ) -> Written:
        """Render messages; with `prompt` as far as the assistant's next words.

        Raises DataError with the template's own reason where it refuses them, and where it cannot be followed.
        """
        written, unclear = self._read(self._render(self._traced, messages, tools, prompt=prompt))
        plain = self._render(self._plain, messages, tools, prompt=prompt)
        if written.text != _SIGNS.sub("", plain):  # the signs of {% generation %}
            raise DataError("looks into messages for special tokens in a way that cannot be followed")
        if unclear:
            # Markers that the template puts together from pieces ('<|' + role + '|>') are its own, too.
            own = self._own([list(messages), list(tools)], written.text, unclear, prompt=prompt)
            return replace(written, markers=tuple(sorted((*written.markers, *own))))
        return written

    def _own(
        self, given: list[Any], text: str, unclear: list[tuple[int, int]], *, prompt: bool
    ) -> list[tuple[int, int]]:
        """Those of the unclear places where the template itself wrote the marker."""
        disarmed = self._disarmed(given)
        if disarmed == given:
            return unclear
        other, own = self._read(self._render(self._traced, *disarmed, prompt=prompt))
        pairs = zip(text, other.text, strict=False)
        same = len(text) == len(other.text) and all(there in {here, _HARMLESS} for here, there in pairs)
        if own and not same:
            raise DataError("puts special tokens together from pieces, and a message holds the text of one")
        return own

    def _replaced(self, text: str) -> str:
        return self.marker.sub(lambda found: self._stand_in(found.group()), text)

    def _stand_in(self, marker: str) -> str:
        for sign, meant in self._meant.items():
            if meant == marker:
                return sign
        sign = chr(_FIRST_STAND_IN + len(self._meant))
        assert ord(sign) <= _LAST_STAND_IN, "a template with two thousand kinds of markers"
        self._meant[sign] = marker
        return sign

    def _render(
        self, template: Template, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any], *, prompt: bool
    ) -> str:
        numbers = {id(message): f"{AT}{number}{AT_END}" for number, message in enumerate(messages)}
        variables: dict[str, Any] = dict(self._variables)
        if template is self._traced:
            variables = {**self._replaced_variables, NUMBER_OF: lambda each: numbers.get(id(each), "")}
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

    def _read(self, rendered: str) -> tuple[Written, list[tuple[int, int]]]:
        """Resolve signs into places; and the markers that stand in the text without a sign."""
        reading = _Reading()
        unclear: list[tuple[int, int]] = []
        for number, piece in enumerate(_SIGNS.split(rendered)):
            if number % 2:
                reading.sign(piece, self._meant)
            else:
                unclear += [(reading.length + m.start(), reading.length + m.end()) for m in self.marker.finditer(piece)]
                reading.add(piece)
        return reading.written(), unclear

    def _disarmed(self, value: Any) -> Any:  # noqa: ANN401 - JSON
        """The same values with no marker in any text, the keys of mappings included."""
        if isinstance(value, str):
            return self.marker.sub(lambda found: _HARMLESS * len(found.group()), value)
        if isinstance(value, Mapping):
            return {self._disarmed(key): self._disarmed(each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [self._disarmed(each) for each in value]
        return value


class _Reading:
    """Traced text as it is read from left to right."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.length = 0
        self.markers: list[tuple[int, int]] = []
        self.begins: list[tuple[int, int]] = []
        self.said: list[tuple[int, int]] = []
        self._said_from = 0

    def add(self, text: str) -> None:
        self.texts.append(text)
        self.length += len(text)

    def sign(self, sign: str, meant: Mapping[str, str]) -> None:
        if sign in meant:
            self.markers.append((self.length, self.length + len(meant[sign])))
            self.add(meant[sign])
        elif sign[0] == AT:
            self.begins.append((self.length, int(sign[1:-1])))
        elif sign == SAID:
            self._said_from = self.length
        else:
            self.said.append((self._said_from, self.length))

    def written(self) -> Written:
        text = "".join(self.texts)
        parts: dict[int, tuple[int, int]] = {}
        stops = [start for start, _ in self.begins[1:]] + [self.length]
        for (start, message), stop in zip(self.begins, stops, strict=False):
            # Of several loops over the messages the last that writes something is the one that writes the turns.
            if message not in parts or text[start:stop].strip():
                parts[message] = (start, stop)
        return Written(text, tuple(self.markers), parts, tuple(self.said))


def traced(source: str, replaced: Callable[[str], str]) -> Template:
    """Compile a template that writes signs for the messages, with `replaced` applied to the texts it writes itself."""
    where = environment()
    tree = _Tracer(replaced).visit(where.parse(source))
    tree.set_environment(where)
    return Template.from_code(where, where.compile(tree), where.make_globals(None))


class _Tracer(NodeTransformer):
    """Puts stand-ins for markers into a template's texts, and the number of the message into its loops.

    A text that is only compared or looked for stays as it is.
    """

    def __init__(self, replaced: Callable[[str], str]) -> None:
        self._replaced = replaced

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:  # noqa: N802 - jinja2's names
        return nodes.TemplateData(self._replaced(node.data), lineno=node.lineno)

    def visit_Const(self, node: nodes.Const) -> nodes.Node:  # noqa: N802
        return nodes.Const(self._replaced(node.value), lineno=node.lineno) if isinstance(node.value, str) else node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:  # noqa: N802
        return node

    def visit_Test(self, node: nodes.Test) -> nodes.Node:  # noqa: N802
        return node

    def visit_Call(self, node: nodes.Call) -> nodes.Node:  # noqa: N802
        called = node.node
        if isinstance(called, nodes.Getattr) and _LOOKING.fullmatch(called.attr):
            node.node = self.visit(called)
            return node
        return self.generic_visit(node)

    def visit_Filter(self, node: nodes.Filter) -> nodes.Node:  # noqa: N802
        if node.name == "replace" and node.node is not None:
            node.node = self.visit(node.node)
            return node
        return self.generic_visit(node)

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802
        speaks = any(_says_something(output) for output in node.find_all(nodes.Output))
        self.generic_visit(node)
        if speaks and isinstance(node.target, nodes.Name):
            line = node.lineno
            function, message = (nodes.Name(name, "load", lineno=line) for name in (NUMBER_OF, node.target.name))
            number = nodes.Call(function, [message], [], None, None, lineno=line)
            node.body.insert(0, nodes.Output([number], lineno=line))
        return node


def _says_something(output: nodes.Output) -> bool:
    return any(not isinstance(each, nodes.TemplateData) or each.data.strip() for each in output.nodes)


class _Generation(Extension):
    """`{% generation %}`: Hugging Face's block around what the assistant says."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        begin, end = (nodes.Output([nodes.TemplateData(sign)], lineno=line) for sign in (SAID, SAID_END))
        return [begin, nodes.Scope(body, lineno=line), end]


def environment() -> Environment:
    """The environment in which Hugging Face renders templates, but for `strftime_now`.

    Tokens that depend on the day they were made could not be made again, so a template that asks for the day finds no
    such function; those that can do without (Llama 3) take a fixed date then.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    return environment


def _refuse(reason: str) -> None:
    raise TemplateError(reason)


def _to_json(
    value: Any,  # noqa: ANN401 - JSON
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the escapes for web pages that jinja2's own filter writes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
