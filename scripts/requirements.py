"""Write requirements.txt and requirements-dev.txt: exact pins of everything, resolved from pyproject.toml.

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


def main() -> None:
    """Write both files: one resolution for both, so that what is tested is what is installed."""
    names = {name_of(pin) for pin in compile_pins()}
    everything = compile_pins("--extra", "dev")
    run_time = [pin for pin in everything if name_of(pin) in names]
    development = [pin for pin in everything if name_of(pin) not in names]
    (ROOT / "requirements.txt").write_text(HEADER.format(what=" needed to train") + "\n".join(run_time) + "\n")
    both = HEADER.format(what=" needed to develop") + "-r requirements.txt\n" + "\n".join(development) + "\n"
    (ROOT / "requirements-dev.txt").write_text(both)


if __name__ == "__main__":
    main()
