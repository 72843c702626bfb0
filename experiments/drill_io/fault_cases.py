"""One run of `ltt train` under a fault, the start after it, and a comparison with an undisturbed run."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from power_loss import list_entries, lose_power

import fork_server
from llm_training_toolkit.checkpoint import list_complete_checkpoints, read_manifest
from llm_training_toolkit.data.sample_log import FetchedSequence
from llm_training_toolkit.errors import ToolkitError
from llm_training_toolkit.launch.drill.data_audit import audit_sequences, read_attempt_spans, read_fetched_sequences
from llm_training_toolkit.runs.directory import RunDirectory
from llm_training_toolkit.runs.json_lines import read_json_lines

HERE = Path(__file__).parent
STEPS = 4
CONFIG = f"""
run: {{name: r}}
model:
  name: qwen3-0.6b
  config_overrides: {{num_hidden_layers: 1, hidden_size: 32, intermediate_size: 64, num_attention_heads: 2,
                      num_key_value_heads: 1, head_dim: 16}}
tokenizer: {{train: {{vocab_size: 512}}}}
data: {{sequence_length: 32, sources: [{{path: CORPUS, format: code}}], eval: {{fraction: 0.1}}}}
train: {{steps: {STEPS}, global_batch_size: 3, micro_batch_size: 3, precision: fp32}}
optim: {{lr: 1e-3}}
checkpoint: {{interval: 2, keep_latest: 1}}
eval: {{interval: 2}}
failures: {{on_loss_spike: ignore, log_samples: true}}
cluster: {{workers: 0}}
"""


class Fault(NamedTuple):
    """What the n-th call meets."""

    action: int
    """Of `faults.c`."""
    code: int = 0
    """Error of a call that fails."""
    sticky: bool = False
    """All later calls fail as well."""
    loses: str = ""
    """Kept after the end of the process: `data` = no bytes that were not synced, `names` = no such names either."""


FAULTS = {
    "call fails: EIO": Fault(1, errno.EIO),
    "call fails: ENOSPC": Fault(1, errno.ENOSPC),
    "half a write, then EIO": Fault(4, errno.EIO),
    "disk full from then on": Fault(4, errno.ENOSPC, sticky=True),
    "SIGKILL": Fault(2),
    "half a write, then SIGKILL": Fault(3),
    "SIGTERM": Fault(5),
    "power lost: unsynced data": Fault(2, loses="data"),
    "power lost: data and names": Fault(2, loses="names"),
}
# `faults.c` is armed in the process of the command; its arguments are the last seven.
_LTT = """
import ctypes, sys
from llm_training_toolkit.cli.app import main
prefix, nth, code, action, sticky, log, graves = sys.argv[-7:]
del sys.argv[-7:]
sys.argv[0] = "ltt"
arm = ctypes.CDLL(None).arm_faults
arm(prefix.encode(), int(nth), int(code), int(action), int(sticky), log.encode(), graves.encode())
main()
"""


def build_library(directory: Path) -> Path:
    """Compile `faults.c` into a directory."""
    library = directory / "faults.so"
    command = ["cc", "-shared", "-fPIC", "-O2", "-o", str(library), str(HERE / "faults.c"), "-ldl"]
    subprocess.run(command, check=True)
    return library


@dataclass(frozen=True)
class Outcome:
    """What a finished run has to be."""

    weights: tuple[str, ...]
    """Checksums of the last checkpoint's files: weights and moments."""
    losses: Mapping[int, tuple[float, ...]]
    """Training loss by step; a step that was logged twice by one attempt has two."""


class Result(NamedTuple):
    """A case: the fault, and everything that was wrong afterwards."""

    fault: str
    call: int
    what: str
    """The call that met the fault, and the file's path below the directory of runs; empty if none did."""
    first: int
    """Exit code of the run under the fault."""
    problems: tuple[str, ...]


class Sweep:
    """Runs in a directory, all from the same corpus, each in a folder of its own with its own cache of tokens."""

    def __init__(self, directory: Path) -> None:
        """Write corpus and configuration, build the library, and do the undisturbed run."""
        self._directory = directory
        corpus = directory / "corpus"
        corpus.mkdir()
        for number in range(12):
            lines = [f"def f{number}_{line}(a):\n    return a * {line}\n" for line in range(2 + number % 3)]
            (corpus / f"m{number}.py").write_text("\n".join(lines))
        self._config = directory / "run.yaml"
        self._config.write_text(CONFIG.replace("CORPUS", str(corpus)))
        self._environment = {**os.environ, "LD_PRELOAD": str(build_library(directory))}
        code, output = self._train("reference", Fault(0), 0)
        assert code == 0, output
        numbered = read_calls(directory / "reference.log", directory / "reference", "call")
        assert list(numbered) == list(range(1, len(numbered) + 1))
        self.calls = list(numbered.values())
        self._run = RunDirectory(directory / "reference" / "r")
        self._reference = read_outcome(self._run)

    def _train(self, name: str, fault: Fault, call: int) -> tuple[int, str]:
        root = self._directory / name
        log, graves = self._directory / f"{name}.log", self._directory / f"{name}.graves"
        shutil.rmtree(graves, ignore_errors=True)
        root.mkdir(exist_ok=True)
        graves.mkdir()
        arming = [root, call, fault.code, fault.action, int(fault.sticky), log, graves]
        given = ["train", self._config, f"run.dir={root}", *arming]
        command = [sys.executable, "-c", _LTT, *map(str, given)]
        done = fork_server.run(command, env=self._environment, capture_output=True, timeout=300)
        return done.returncode, done.stdout + done.stderr

    def run_case(self, kind: str, call: int) -> Result:
        """Run under a fault at a call (from 1), once more without, and compare."""
        fault, name = FAULTS[kind], "case"
        root = self._directory / name
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        before = list_entries(root)
        first, said = self._train(name, fault, call)
        announced = [int(step) for step in re.findall(r"^step (\d+): checkpoint ", said, re.MULTILINE)]
        log, graves = (self._directory / f"{name}{suffix}" for suffix in (".log", ".graves"))
        met = read_calls(log, root, "fault")
        if fault.loses:
            lose_power(root, log, graves, before, names=fault.loses == "names")
        run = RunDirectory(root / "r")
        problems = [] if call in met else ["the fault was not met"]
        problems += _find_first_problems(run, fault, first, said, announced)
        second, said = self._train(name, Fault(0), 0)
        if second != 0:
            problems.append(f"the next start ended with {second}: {said.strip().splitlines()[-1:]}")
        elif not fault.loses:
            problems += self._audit(run)
        if "Traceback" in said:
            problems.append("traceback of the next start")
        problems += _compare(read_outcome(run), self._reference) if second == 0 else []
        return Result(kind, call, met.get(call, ""), first, tuple(problems))

    def _audit(self, run: RunDirectory) -> Iterator[str]:
        found, wanted = (_read_sequences(each) for each in (run, self._run))
        missing, doubled = audit_sequences(found, wanted, [[len(wanted)] * 10])
        if missing or doubled:
            yield f"{missing} sequences missing, {doubled} doubled"


def read_calls(log: Path, root: Path, kind: Literal["call", "fault"]) -> dict[int, str]:
    """Read the counted calls of a log of `faults.c`, or those that met the fault: what and where, by number."""
    rows = [line.split("\t") for line in log.read_text().splitlines()]
    return {int(row[1]): f"{row[4]} {os.path.relpath(row[3], root)}" for row in rows if row[0] == kind}


def _read_sequences(run: RunDirectory) -> list[FetchedSequence]:
    newest = list_complete_checkpoints(run.checkpoints_dir)[-1]
    return read_fetched_sequences(run, read_attempt_spans(run, newest.name))


def _find_first_problems(
    run: RunDirectory, fault: Fault, code: int, said: str, announced: Sequence[int]
) -> Iterator[str]:
    """Find what the faulty run itself did wrong: its words, and announced checkpoints that are not there."""
    if "Traceback" in said:
        yield "traceback"
    if fault.action in {2, 3} and code != -signal.SIGKILL:
        yield f"exit code {code} after SIGKILL"
    if fault.action == 5 and code not in {0, 75}:
        yield f"exit code {code} after SIGTERM"
    if code > 0 and code != 75 and "error: " not in said:
        yield "no error message"
    there = [read_manifest(directory).step for directory in list_complete_checkpoints(run.checkpoints_dir)]
    if announced and max(announced) > max(there, default=0):
        yield f"checkpoint of step {max(announced)} was announced, there are {there}"


def read_outcome(run: RunDirectory) -> Outcome:
    """Read what a finished run is compared by."""
    try:
        manifest = read_manifest(list_complete_checkpoints(run.checkpoints_dir)[-1])
    except (ToolkitError, IndexError, OSError):
        return Outcome((), {})
    losses: dict[int, dict[int, list[float]]] = {}
    for row in read_json_lines(run.metrics_path):
        if "train/loss" in row:
            losses.setdefault(row["step"], {}).setdefault(row["attempt"], []).append(row["train/loss"])
    newest = {step: tuple(found[max(found)]) for step, found in losses.items()}
    return Outcome(tuple(sorted(entry.sha256 for entry in manifest.files)), newest)


def _compare(found: Outcome, wanted: Outcome) -> Iterator[str]:
    if found.weights != wanted.weights:
        yield "other weights"
    if found.losses != wanted.losses:
        steps = sorted(step for step in wanted.losses if found.losses.get(step) != wanted.losses[step])
        yield f"metrics of steps {steps} are lost or different"
