"""A sample of `make drill-io`: a call fails, is half done, kills or loses power, and the next start ends bit for bit.

The whole sweep over every call is experiments/drill_io/run.py.
"""

from __future__ import annotations

import shutil

import pytest
from fault_cases import FAULTS, Sweep

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler here for the library of faults"),
]
PLACES = ("metrics.jsonl", "fragments_00000.safetensors", "/manifest.json", "export.writing/")


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    return Sweep(tmp_path_factory.mktemp("faults").resolve())


@pytest.mark.parametrize("place", PLACES)
def test_a_fault_costs_no_weights_no_sequences_and_no_metrics(sweep: Sweep, place: str) -> None:
    """Every second kind of fault, each at another call for the file; the next place meets the others."""
    calls = [number for number, call in enumerate(sweep.calls, 1) if place.lstrip("/") in call.replace("/.", "/")]
    kinds = list(FAULTS)[PLACES.index(place) % 2 :: 2]
    for turn, kind in enumerate(kinds):
        result = sweep.run_case(kind, calls[turn * len(calls) // len(kinds)])
        assert result.problems == (), result
