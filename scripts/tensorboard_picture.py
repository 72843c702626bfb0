"""Take a picture of TensorBoard as a person sees it: a real server, a real Chromium.

python scripts/tensorboard_picture.py runs/quickstart docs/pictures/tensorboard.png
"""

from __future__ import annotations

import argparse
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from photograph import Page, photograph

TAGS = "train/loss|eval/loss|lr|grad_norm|tokens_per_second|step_seconds"
VIEW = f"?darkMode=false&smoothing=0&tagFilter={TAGS}#timeseries"
CLICKS = (
    "[...document.querySelectorAll('mat-checkbox')].find(box => box.innerText.includes('step selection'))"
    ".querySelector('input').click()",
    "[...document.querySelectorAll('button')].find(button => button.innerText.includes('Settings')).click()",
)
"""Leave out the tables under the curves, and close the settings."""


@contextmanager
def tensorboard(directory: Path) -> Iterator[str]:
    """The address of a TensorBoard over a directory, as soon as it has read the runs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [sys.executable, "-m", "tensorboard.main", "--logdir", str(directory), "--port", str(port)]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            address = f"http://127.0.0.1:{port}/"
            _wait_for_runs(address, process)
            yield address
        finally:
            process.terminate()


def _wait_for_runs(address: str, process: subprocess.Popen[bytes], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if process.poll() is not None:
            raise SystemExit(f"tensorboard ended with {process.returncode}")
        try:
            with urllib.request.urlopen(f"{address}data/runs", timeout=5) as answer:
                if answer.read().strip() not in {b"", b"[]"}:
                    return
        except (urllib.error.URLError, ConnectionError):
            pass
        time.sleep(0.5)
    raise SystemExit(f"tensorboard found no run within {seconds:g} s")


def main() -> None:
    """Serve a run and photograph it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run directory, or a directory of runs")
    parser.add_argument("picture", type=Path)
    arguments = parser.parse_args()
    with tensorboard(arguments.run) as address:
        photograph(Page(address + VIEW, size=(1300, 980), scripts=CLICKS), arguments.picture)
    print(arguments.picture)


if __name__ == "__main__":
    main()
