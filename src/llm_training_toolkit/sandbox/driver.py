"""Runs a program to its end and reports whether it got there. The text of this file runs inside the containment.

The standard input holds a secret word in its first line and the program after it; the argument is the limits as JSON.
Only who has read the secret can report: the program's own output goes nowhere. Imports the standard library alone.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import types

_SHOWN = 200
"""Characters of an error's message that are reported."""


def main() -> None:
    """Report `started`, run the program, report `passed` or `failed` with the error."""
    secret, source = sys.stdin.buffer.read().split(b"\n", 1)
    report, nowhere = os.dup(1), os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    for name, value in json.loads(sys.argv[1]).items():
        resource.setrlimit(getattr(resource, name), (value, value))
    os.write(report, secret + b" started\n")
    module = types.ModuleType("program")
    sys.modules["program"] = module
    try:
        exec(compile(source, "program", "exec"), module.__dict__)  # noqa: S102 - what this file is for
        verdict = "passed"
    except BaseException as error:  # noqa: BLE001 - the program may raise whatever there is
        verdict = f"failed {_described(error)}"
    os.write(report, secret + b" " + verdict.encode(errors="replace") + b"\n")
    os._exit(0)  # threads of the program may still run


def _described(error: BaseException) -> str:
    try:
        text = f"{type(error).__name__}: {error}".removesuffix(": ")
    except BaseException:  # noqa: BLE001 - the error's own text is the program's, too
        text = type(error).__name__
    return " ".join(text[:_SHOWN].split())


if __name__ == "__main__":
    main()
