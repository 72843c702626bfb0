"""The loop where it does not step: it begins at the end of the data that is prepared."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llm_training_toolkit.checkpoint import Rule
from llm_training_toolkit.checkpoint.manager import CheckpointSaver, Lineage
from llm_training_toolkit.checkpoint.state import Progress
from llm_training_toolkit.config import EvalTask, from_json
from llm_training_toolkit.data.dataloader import Feed
from llm_training_toolkit.data.prepare.dataset_info import Receipt
from llm_training_toolkit.data.prepare.epochs import facts_of
from llm_training_toolkit.distributed.context import RunContext, Wish
from llm_training_toolkit.errors import DataError
from llm_training_toolkit.evaluation.in_training import Midway
from llm_training_toolkit.export.export_run import Trained
from llm_training_toolkit.plan import make_plan
from llm_training_toolkit.runs.directory import RunDirectory
from llm_training_toolkit.runs.goodput import Account
from llm_training_toolkit.train.components import Parts
from llm_training_toolkit.train.hooks import at_tasks
from llm_training_toolkit.train.loop import train

FAR = 10_000
"""A step whose data is not prepared."""


def parts(prepared_run: RunDirectory, run: RunDirectory, wish: Wish) -> Parts:
    """A run that goes on from step FAR; nothing of its engine and its metrics is reached."""

    def no_more(_receipt: Receipt) -> Receipt:
        raise DataError("later epochs cannot be prepared")

    receipt = Receipt.from_json(prepared_run.receipt.read_text())
    config = from_json(prepared_run.resolved.read_text())
    plan = make_plan(config, facts_of(receipt))
    context = RunContext(0, 1, torch.device("cpu"), wish=lambda: wish)
    more = no_more if wish is Wish.GO_ON else lambda receipt: receipt
    feed = Feed(receipt, global_batch=plan.global_batch, epochs=None, newest=more)
    absent: Any = SimpleNamespace(owned_fragments=list)
    midway = Midway(Trained(run, config, receipt), metrics=absent, context=context)
    lineage = Lineage(2, "step", 0, 1, "c", "d", {}, {})
    saver = CheckpointSaver(run, context, absent, lineage, every_steps=1, every_seconds=None, rule=Rule(1))
    origin = Progress(FAR, FAR, FAR * plan.global_batch)
    schedule = replace(plan.schedule(), steps=2 * FAR)
    return Parts(plan, schedule, 0, context, absent, feed, saver, absent, 2, Account(0.0, {}, 0), origin, midway)


@pytest.mark.parametrize(("wish", "status"), [(Wish.LEAVE, "left"), (Wish.STOP, "stopped")])
def test_a_wish_while_it_waits_at_its_first_step_ends_it_without_another_checkpoint(
    prepared_run: RunDirectory, tmp_path: Path, wish: Wish, status: str
) -> None:
    run = RunDirectory(tmp_path)
    ready = parts(prepared_run, run, wish)
    assert train(ready) == (status, ready.origin)
    assert not run.checkpoints.exists()


def test_data_that_will_never_be_there_ends_it_in_words(prepared_run: RunDirectory, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="later epochs cannot be prepared"):
        train(parts(prepared_run, RunDirectory(tmp_path), Wish.GO_ON))


@pytest.mark.parametrize("steps_left", [0, 1])
def test_tasks_between_steps_are_not_carried_out_after_the_last_one(
    prepared_run: RunDirectory, tmp_path: Path, steps_left: int
) -> None:
    run = RunDirectory(tmp_path)
    ready = parts(prepared_run, run, Wish.STOP)
    config = from_json(prepared_run.resolved.read_text())
    tasks = config.eval.model_copy(update={"tasks": (EvalTask(task="perplexity", every=1),)})
    trained = Trained(
        run, config.model_copy(update={"eval": tasks}), Receipt.from_json(prepared_run.receipt.read_text())
    )
    midway = Midway(trained, metrics=ready.metrics, context=ready.context)
    ready = replace(ready, midway=midway, schedule=replace(ready.schedule, steps=FAR + steps_left))
    at_tasks(ready, ready.origin)
    assert ready.context.pulse.read().doing.startswith("carrying out") == bool(steps_left)
