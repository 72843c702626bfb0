"""Faults of input and output at every call of a short run that changes the disk: a table of what was lost.

python experiments/drill_io/run.py                  # what `make drill-io` does: two faults for each call
python experiments/drill_io/run.py --each 9         # every fault at every call
python experiments/drill_io/run.py --minutes 5      # no longer than that; the same command resumes later
python experiments/drill_io/run.py --table-only     # the table again, from result.jsonl

A case that result.jsonl has is not done again; delete the file to begin anew. A case that did not end in time, as on a
busy machine, is no result: it is repeated at the end, and by the next command if need be.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "tests" / "support")]

from fault_cases import FAULTS, Sweep  # noqa: E402

_GOLDEN_RATIO = (5**0.5 - 1) / 2
RESULT, TABLE = HERE / "result.jsonl", HERE / "table.md"


def list_cases(calls: int, each: int) -> Iterator[tuple[str, int]]:
    """Yield fault and call so that every call meets `each` faults, in turn, and every fault as many calls.

    A part of them is spread over the whole run.
    """
    kinds = list(FAULTS)
    spread = sorted(range(1, calls + 1), key=lambda call: call * _GOLDEN_RATIO % 1)
    for turn in range(each):
        first = turn * (len(kinds) // each)
        yield from ((kinds[(call + first) % len(kinds)], call) for call in spread)


def read_results() -> list[dict[str, Any]]:
    """Read the cases that are done."""
    return [json.loads(line) for line in RESULT.read_text().splitlines()] if RESULT.is_file() else []


def run_cases(each: int, minutes: float) -> list[tuple[str, int]]:
    """Run the cases that are not done yet, until the time is over, and return those that did not end, even twice."""
    until = time.monotonic() + 60 * minutes
    done = {(row["fault"], row["call"]) for row in read_results()}
    with tempfile.TemporaryDirectory() as directory:
        sweep = Sweep(Path(directory).resolve())
        cases = [case for case in list_cases(len(sweep.calls), each) if case not in done]
        endless = [case for case in cases if time.monotonic() < until and not record_case(sweep, *case)]
        return [case for case in endless if time.monotonic() > until or not record_case(sweep, *case)]


def record_case(sweep: Sweep, kind: str, call: int) -> bool:
    """Run a case and append its result; False, without one, if a command of it did not end in time."""
    try:
        result = sweep.run_case(kind, call)
    except subprocess.TimeoutExpired as error:
        print(f"{kind}, call {call}: no end within {error.timeout:.0f} s, to be repeated", flush=True)
        return False
    with RESULT.open("a") as file:
        file.write(json.dumps(result._asdict()) + "\n")
    if result.problems:
        print(f"{kind}, call {call} ({result.what}): {'; '.join(result.problems)}", flush=True)
    return True


def format_table(rows: list[dict[str, Any]]) -> str:
    """Return the table: a row for each fault, with the exit codes of the run that met it."""
    by_kind: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        by_kind[row["fault"]].append(row)
    lines = ["| fault | cases | exit codes of the faulty run | cases with a problem |", "|---|---|---|---|"]
    for kind in [kind for kind in FAULTS if kind in by_kind]:
        found = by_kind[kind]
        codes = ", ".join(f"{code}: {count}" for code, count in sorted(Counter(row["first"] for row in found).items()))
        lines.append(f"| {kind} | {len(found)} | {codes} | {sum(bool(row['problems']) for row in found)} |")
    wrong = sum(bool(row["problems"]) for row in rows)
    lines.append(f"| all | {len(rows)}, at {len({row['call'] for row in rows})} calls | | {wrong} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run the sweep; the exit code is 1 if a case has a problem or did not end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--each", type=int, default=2, choices=range(1, len(FAULTS) + 1), help="faults for each call")
    parser.add_argument("--minutes", type=float, default=24 * 60, help="longest time")
    parser.add_argument("--table-only", action="store_true")
    given = parser.parse_args()
    endless = [] if given.table_only else run_cases(given.each, given.minutes)
    rows = read_results()
    TABLE.write_text(format_table(rows))
    print(TABLE.read_text(), end="")
    return int(bool(endless) or any(row["problems"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
