"""Jinja environment for the templates of strangers: sandboxed, and with a bound on steps and on the size of texts.

Jinja's own sandbox keeps a template from attributes and files, not from running for ever: nested loops over `range`,
macros that call themselves twice, and texts that are multiplied or doubled.
"""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

# Of one rendering: two seconds on a slow core. Templates that look for the last question of each message are quadratic.
_MAX_STEPS, _MAX_STEPS_PER_PAIR = 200_000, 10
_MAX_SIZE = 50_000_000  # characters or items of one value: far above a conversation
_MAX_EXPONENT = 64


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Sandboxed environment whose templates raise SecurityError beyond their bounds. Not for several threads."""

    intercepted_binops = frozenset({"+", "*", "**"})

    def __init__(self, *args: Any, **options: Any) -> None:  # noqa: ANN401 - jinja2's own
        super().__init__(*args, **options)
        self.reset_steps(0)

    def reset_steps(self, messages: int) -> None:
        """Begin a rendering of a number of messages."""
        self._steps_left = _MAX_STEPS + _MAX_STEPS_PER_PAIR * messages**2

    @property
    def counted_step(self) -> int:
        """Steps left, with one less at each look: an iteration of a loop, or a call of a macro.

        A property, because a call of a method by a sandboxed template costs ten times as much.
        """
        self._steps_left -= 1
        if self._steps_left < 0:
            raise SecurityError("it takes too many steps: nested loops, or macros that call themselves")
        return self._steps_left

    def join_texts(self, *parts: object) -> str:
        """Return what the operator `~` returns."""
        texts = [str(part) for part in parts]
        _check_size(sum(map(len, texts)))
        return "".join(texts)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:  # noqa: ANN401
        """Return the result of an operator, after a check of its size."""
        if operator == "**" and isinstance(right, int | float) and abs(right) > _MAX_EXPONENT:
            raise SecurityError(f"it raises a number to the power of {right}")
        if operator == "+" and isinstance(left, Sized) and isinstance(right, Sized):
            _check_size(len(left) + len(right))
        for value, times in ((left, right), (right, left)) if operator == "*" else ():
            if isinstance(value, Sized) and isinstance(times, int):
                _check_size(len(value) * times)
        return super().call_binop(context, operator, left, right)

    def _generate(self, source: nodes.Template, *args: Any, **options: Any) -> str:  # noqa: ANN401
        """Compile a template with its steps counted: jinja2's hook for other generators of code."""
        tree = _BoundingTransformer().visit(source)
        tree.set_environment(self)
        return super()._generate(tree, *args, **options)


def _check_size(size: int) -> None:
    if size > _MAX_SIZE:
        raise SecurityError(f"it makes a text or list of {size:,} characters or items")


class _BoundingTransformer(NodeTransformer):
    """AST transformer that counts iterations and calls, and joins texts by `join_texts`."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802 - jinja2's names
        return self._count_body(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:  # noqa: N802
        return self._count_body(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        method = nodes.EnvironmentAttribute("join_texts")
        return nodes.Call(method, node.nodes, [], None, None, lineno=node.lineno)

    def _count_body(self, node: nodes.For | nodes.Macro) -> nodes.Node:
        self.generic_visit(node)
        # An attribute of the environment, which no variable of a template can hide.
        node.body.insert(0, nodes.ExprStmt(nodes.EnvironmentAttribute("counted_step"), lineno=node.lineno))
        return node
