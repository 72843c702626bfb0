"""Write requirements.txt and its -dev and -bench: exact pins of everything, resolved from pyproject.toml.

Called by `make requirements`. The pins name no index and no build of torch: which build pip takes is
up to the index it is set to.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEADER = "# Written by `make requirements` from pyproject.toml; do not edit. Exact pins of everything{what}.\n"


def compile_pins(*options: str) -> list[str]:
    """The resolved pins, one a line, as pip-compile finds them."""
    command = [
        *(sys.executable, "-m", "piptools", "compile", "--quiet", "--strip-extras", "--no-header", "--no-annotate"),
        *("--no-emit-index-url", "--no-emit-trusted-host", "--no-emit-find-links", "--allow-unsafe"),
        *("--output-file", "-", *options, "pyproject.toml"),
    ]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    pins = [line.strip() for line in done.stdout.splitlines() if re.match(r"[A-Za-z0-9]", line)]
    return [re.sub(r"\+[a-z0-9.]+$", "", pin) for pin in pins]


def name_of(pin: str) -> str:
    """The package of a pin."""
    return pin.partition("==")[0]


def write(name: str, what: str, pins: list[str], before: str = "") -> None:
    """Write a file of pins, on top of those of another."""
    first = f"-r {before}\n" if before else ""
    (ROOT / name).write_text(HEADER.format(what=what) + first + "\n".join(pins) + "\n")


def main() -> None:
    """Write all files: one resolution for all, so that what is tested is what is installed."""
    run_time = {name_of(pin) for pin in compile_pins()}
    development = {name_of(pin) for pin in compile_pins("--extra", "dev")} - run_time
    pins = compile_pins("--extra", "dev", "--extra", "bench")
    of = {name_of(pin): pin for pin in pins}
    bench = [name for name in of if name not in run_time | development]
    write("requirements.txt", " needed to train", [pin for name, pin in of.items() if name in run_time])
    write(
        "requirements-dev.txt",
        " needed to develop",
        [pin for name, pin in of.items() if name in development],
        before="requirements.txt",
    )
    what = " that only `make bench-data` compares with"
    write("requirements-bench.txt", what, [of[name] for name in bench], before="requirements.txt")


if __name__ == "__main__":
    main()
