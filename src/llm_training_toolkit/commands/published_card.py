"""Model card of a published export: the card of the export with licence, base and evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RepositoryNotFoundError

from llm_training_toolkit.checkpoint.run import Run
from llm_training_toolkit.config import Config
from llm_training_toolkit.errors import CheckpointError, PlanError, Problem
from llm_training_toolkit.evaluation.records import EvalRecord
from llm_training_toolkit.evaluation.table import format_metric_value, is_metric

CARD_NAME = "README.md"
_PLACE = "PATH OF THIS DIRECTORY"  # in the card of an export, for its address


def find_licence(trained: Run, given: str | None) -> str | None:
    """Return the licence's name, which is None for a model from random weights without one; may ask the hub.

    Raises PlanError if weights that the run began with name no licence and none is given.
    """
    base = trained.config.model.path or trained.config.model.init_from
    licence = given or (_read_licence(base) if base is not None else None)
    if base is not None and licence is None:
        what = f"the weights that the run began with, {base}, name no licence"
        fix = "Give the licence that holds for them: --license apache-2.0"
        raise PlanError.from_problems(f"--license: {what}. {fix}", [Problem("no-licence", "--license", what, fix)])
    return licence


def format_published_card(
    directory: Path, trained: Run, evaluations: Sequence[EvalRecord], *, repository: str, licence: str | None
) -> str:
    """Return the card. Raises CheckpointError if the export's cannot be read."""
    try:
        card = ModelCard((directory / CARD_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{directory / CARD_NAME}: cannot be read ({reason}): ltt export writes it anew"
        ) from error
    card.data["license"] = licence  # those that are None are left out when it is written
    card.data["base_model"] = _find_hub_base(trained.config)
    card.data["tags"] = ["llm-training-toolkit", *(["lora"] if trained.config.model.lora is not None else [])]
    card.text = card.text.replace(_PLACE, repository) + _format_evaluations(evaluations)
    return str(card)


def _find_hub_base(config: Config) -> str | None:
    """Return the hub id of the base: the hub accepts no path of this machine there."""
    path = config.model.path
    return path if path is not None and not Path(path).expanduser().exists() and path.count("/") == 1 else None


def _read_licence(base: str) -> str | None:
    """Return the licence in the card of a directory or hub id, None without one."""
    path = Path(base).expanduser()
    place = path / CARD_NAME if path.is_dir() else base
    if isinstance(place, Path) and not place.is_file():
        return None
    try:
        found = ModelCard.load(place, ignore_metadata_errors=True).data.get("license")
    except (EntryNotFoundError, RepositoryNotFoundError, HFValidationError):  # the last: a path that is gone, a URI
        return None
    return str(found) if found else None


def _format_evaluations(evaluations: Sequence[EvalRecord]) -> str:
    """Return a table of the metrics; empty without evaluations."""
    rows = [
        f"| {record.task} | {name} | {format_metric_value(name, value)} | {_hide_directories(record.data)} |"
        for record in evaluations
        for name, value in record.figures.items()
        if is_metric(name)
    ]
    head = "\n## Evaluation\n\n| task | metric | value | data |\n|---|---|---|---|\n"
    return head + "\n".join(rows) + "\n" if rows else ""


def _hide_directories(data: str) -> str:
    """Return a path's last part: cards are published."""
    return Path(data).name if data.startswith("/") else data
