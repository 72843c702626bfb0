"""Held-out documents packed into one row are evaluated as if each were alone: the way the loop evaluates them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

import rank_tasks
from llm_training_toolkit.runs.directory import RunDirectory
from rank_pool import RankPool
from unit.models.test_document_isolation import MODELS

Pools = Callable[[int], RankPool]


@pytest.mark.parametrize("attention", ["eager", "sdpa", "varlen"])
@pytest.mark.parametrize("model", MODELS)
def test_changing_a_held_out_document_changes_no_loss_and_no_logit_of_another(
    pools: Pools, prepared_run: RunDirectory, model: str, attention: str
) -> None:
    [found] = pools(1).run(
        rank_tasks.evaluate_packed_documents,
        run=str(prepared_run.path),
        model=MODELS[model],
        attention=attention,
    )
    loss, changed, leaking = (np.array(found[name]) for name in ("loss", "changed", "leaking"))
    documents = len(loss)
    assert documents > 1
    itself = np.eye(documents, dtype=bool)
    assert (np.array(found["same_logits"]) != itself).all()
    assert ((changed == loss) != itself).all()
    # The same with positions that continue through the row: then the later ones see the earlier ones.
    assert (leaking[0, 1:] != leaking[-1, 1:]).all()
