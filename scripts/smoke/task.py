"""A task's own process: arguments from one JSON file, the result into another.

Standard output belongs to the log, because the toolkit sends it to the run's logs while it trains.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llm_training_toolkit.runs.atomic_write import write_atomically

Values = dict[str, Any]


def run(work: Callable[[Values], Values]) -> None:
    """Do the work of the task that this process was started for; exit code 1 where it raised."""
    arguments, result = map(Path, sys.argv[1:3])
    try:
        answer = work(json.loads(arguments.read_text()))
    except Exception as error:  # noqa: BLE001 - it becomes the failure of a row
        answer = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
    write_atomically(result, json.dumps(answer))
    sys.exit("error" in answer)
