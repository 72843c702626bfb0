"""The runs that are jobs of a cluster, as a table."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from rich.markup import escape
from rich.table import Table

from llm_training_toolkit.launch.jobs.client import Job
from llm_training_toolkit.runs_table import clock

_COLOURS = {"pending": "cyan", "running": "green", "succeeded": "bold green", "stopped": "yellow", "failed": "red"}


def jobs_table(jobs: Iterable[Job]) -> Table:
    """One line a job, as `jobs_of` sorts them."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("run", "state", "began", "took", "job", "command"):
        table.add_column(title, overflow="fold")
    for job in jobs:
        began = time.strftime("%Y-%m-%d %H:%M", time.localtime(job.began)) if job.began else ""
        took = clock((job.ended or time.time()) - job.began) if job.began else ""
        state = f"[{_COLOURS.get(job.status, 'default')}]{job.status}[/]"
        table.add_row(escape(job.run), state, began, took, escape(job.id), escape(job.entrypoint.removeprefix("exec ")))
    return table


def jobs_json(jobs: Iterable[Job]) -> list[dict[str, Any]]:
    """The same for programs."""
    return [asdict(job) for job in jobs]
