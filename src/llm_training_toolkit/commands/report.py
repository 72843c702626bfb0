"""`ltt report`: one HTML page of one or several runs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from llm_training_toolkit.config import parse_config_json
from llm_training_toolkit.config.uri import is_uri
from llm_training_toolkit.data.prepare.dataset_info import DatasetInfo
from llm_training_toolkit.data.prepare.epochs import build_data_facts
from llm_training_toolkit.errors import PlanError
from llm_training_toolkit.families import recall_plan
from llm_training_toolkit.plan import ClusterEstimate, ClusterHardware, estimate_on_cluster, make_plan
from llm_training_toolkit.report.collect import collect_run
from llm_training_toolkit.report.page import render_page
from llm_training_toolkit.runs.atomic_write import write_atomically
from llm_training_toolkit.runs.directory import RunDirectory, check_run
from llm_training_toolkit.runs.storage.open import open_path


def write_report(places: Sequence[str], output: Path, hardware: ClusterHardware | None = None) -> Path:
    """Write the page of the runs at paths or addresses; with `hardware` also their forecast on that cluster.

    Raises CheckpointError for a place without a run, PlanError for a run that is named twice.
    """
    with ExitStack() as stack:
        runs = [check_run(stack.enter_context(open_path(place))) for place in places]
        locations = [run.uri if is_uri(run.uri) else str(run.path.resolve()) for run in runs]
        twice = next((each for each in locations if locations.count(each) > 1), None)
        if twice is not None:
            raise PlanError(f"{twice}: named twice: name each run once")
        estimates = [None if hardware is None else _estimate_run(run, hardware) for run in runs]
        page = render_page([collect_run(run) for run in runs], estimates)
    # An error may name undecodable bytes of a file's name: lone surrogates, which UTF-8 cannot hold.
    write_atomically(output, page.encode("utf-8", errors="replace").decode("utf-8"))
    return output


def _estimate_run(run: RunDirectory, hardware: ClusterHardware) -> ClusterEstimate:
    """Estimate a run as it was resolved, with what is known of its data."""
    config = parse_config_json(run.resolved_config_path.read_text(encoding="utf-8"), str(run.resolved_config_path))
    config = recall_plan(config, run.path)
    facts = None
    if run.dataset_info_path.is_file():
        facts = build_data_facts(DatasetInfo.from_json(run.dataset_info_path.read_text(encoding="utf-8")))
    return estimate_on_cluster(config, make_plan(config).with_data(facts), hardware)
