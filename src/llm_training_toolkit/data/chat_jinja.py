"""Chat templates as programs: the environment Hugging Face runs them in, and how they are changed to be followed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from jinja2 import Environment, Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

# Signs are surrogates: code points that UTF-8 cannot express, so no record holds one.
AT, AT_END = "\ud800", "\ud801"
"""Around the number of the message that a loop is at."""
SAID, SAID_END = "\ud802", "\ud803"
"""Around what a `{% generation %}` block writes."""
NUMBER_OF = "ltt_number_of"
"""The function that a traced template calls with what a loop is at; it gives the sign, or nothing."""
_LOOKING = re.compile("(starts|ends)with|r?(split|partition|find|index)|[lr]?strip|count|replace|remove(prefix|suffix)")
"""Methods whose arguments are looked for in a text, and not written."""


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
