"""Simulation of processes that want the same run in a store: they stop, die and come back between any two requests.

A hypothesis state machine lets processes take turns at a store in memory, request by request. They do what a start of
a run does, with the real lease, attempts and storage: claim, open, begin an attempt, resume, save, give back. Time
passes meanwhile, the store's clocks differ, and the run is removed under them. The seed is fixed.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from llm_training_toolkit.checkpoint import find_latest_checkpoint
from llm_training_toolkit.errors import LaunchError
from llm_training_toolkit.launch.drill.data_audit import read_attempt_spans
from llm_training_toolkit.runs.attempts import (
    begin_attempt,
    end_attempt,
    find_takeover,
    read_attempt_record,
    update_attempt,
)
from llm_training_toolkit.runs.directory import RunDirectory
from llm_training_toolkit.runs.storage import lease as leases
from llm_training_toolkit.runs.storage.append_log import group_segments_by_file
from llm_training_toolkit.runs.storage.lease import EXPIRES_AFTER, acquire_lease
from llm_training_toolkit.runs.storage.s3_client import S3Client
from llm_training_toolkit.runs.storage.s3_storage import RunReplacedError, S3Storage
from simulated_store import SimulatedProcess, SimulatedStore, Write, find_process

ADDRESS, PREFIX = "s3://bucket/run", "run/"
CLOCK_ERROR = 3.0  # seconds: of the store's clocks, and of times in whole seconds
MOST_ALIVE = 3
SAVES = 3
MEMORY = Path("/dev/shm")  # staging directories are synced, and a disk would take most of the time


@dataclass
class Worker:
    """One start of the run."""

    process: SimulatedProcess
    began_to: str = ""
    """What it does now."""
    began_at: int = 0
    """Number of writes to the store when it began to do that."""
    in_run_since: int | None = None
    """Number of writes when it had begun its attempt."""
    claims_seen: dict[str, float] | None = None
    """Ages of the claims when it last listed them."""


class StoreSimulation(RuleBasedStateMachine):
    """One address in a store, and the processes that have been started on it."""

    client: S3Client

    @initialize()
    def open_store(self) -> None:
        self.store = SimulatedStore()
        self.store.on_write, self.store.on_list = self.check_write, self.note_listing
        self.directory = Path(tempfile.mkdtemp(dir=MEMORY if MEMORY.is_dir() else None))
        self.workers: dict[SimulatedProcess, Worker] = {}
        self.writes = 0
        self.removed_at = -1
        self.has_late_write = False

    def teardown(self) -> None:
        self.check_run()
        for process in self.workers:
            process.kill()
        shutil.rmtree(self.directory)

    def find_alive(self) -> list[SimulatedProcess]:
        return [process for process in self.workers if process.is_alive]

    @precondition(lambda self: len(self.find_alive()) < MOST_ALIVE)
    @rule()
    def start(self) -> None:
        process = SimulatedProcess(f"p{len(self.workers)}", self.train)
        self.workers[process] = Worker(process)

    @precondition(lambda self: self.find_alive())
    @rule(data=st.data(), requests=st.integers(1, 6))
    def advance(self, data: st.DataObject, requests: int) -> None:
        """One process goes on; the others are slow, or suspended."""
        self.advance_process(data.draw(st.sampled_from(self.find_alive())), requests)

    @precondition(lambda self: self.find_alive())
    @rule(data=st.data(), requests=st.integers(10, 60))
    def advance_far(self, data: st.DataObject, requests: int) -> None:
        self.advance_process(data.draw(st.sampled_from(self.find_alive())), requests)

    def advance_process(self, process: SimulatedProcess, requests: int) -> None:
        process.advance(requests)
        allowed: tuple[type[Exception], ...] = (LaunchError, RunReplacedError)
        if self.is_replaced(self.workers[process]):
            allowed += (FileExistsError,)  # its last manifest meets that of the later run
        if process.error is not None and not isinstance(process.error, allowed):
            raise process.error

    def is_replaced(self, worker: Worker) -> bool:
        """Whether the run that it trains in was removed."""
        return worker.in_run_since is not None and worker.in_run_since <= self.removed_at

    @precondition(lambda self: len(self.find_alive()) == MOST_ALIVE)
    @rule(data=st.data())
    def kill(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(self.find_alive())).kill()

    @rule(seconds=st.sampled_from([1.0, 5.0, 30.0, EXPIRES_AFTER + CLOCK_ERROR, 600.0]))
    def pass_time(self, seconds: float) -> None:
        self.store.now += seconds

    def is_worth_removing(self) -> bool:
        """Whether a process trains in the run, or the first ones start."""
        training = [worker.in_run_since for process, worker in self.workers.items() if process.is_alive]
        return len(self.workers) in {1, 2} or any(since is not None and since > self.removed_at for since in training)

    @precondition(lambda self: self.is_worth_removing())
    @rule()
    def remove_the_run(self) -> None:
        """By other means, under the processes that work on it."""
        self.check_run()
        self.store.remove(list(self.store.objects))
        self.removed_at, self.has_late_write = self.writes, False

    def train(self) -> None:
        """Do what a start of the run does, in the thread of a process."""
        process = find_process()
        assert process is not None
        worker, bucket = self.workers[process], self.store.connect(self.client)
        lease = acquire_lease(bucket, lambda _text: None)
        self.begin(worker, "open")
        storage = S3Storage(bucket, self.directory / process.name / "run")
        storage.refresh_directory(storage.run.path)
        self.begin(worker, "begin an attempt")
        attempt = begin_attempt(storage.run, {"workers": 1})
        run_id = str(read_attempt_record(storage.run, attempt)["run_id"])
        newest = find_latest_checkpoint(storage.run.checkpoints_dir)
        update_attempt(storage.run, attempt, resumed=newest.name if newest else None)
        storage.flush()
        worker.in_run_since = self.writes
        step = int(newest.name[5:14]) if newest else 0
        for _ in range(SAVES):
            step += 1
            self.begin(worker, "renew")
            lease.renew()  # a holder that learns of its loss only says so
            self.begin(worker, "send metrics")
            with storage.run.metrics_path.open("a") as file:
                file.write(json.dumps({"step": step, "attempt": attempt, "run_id": run_id}) + "\n")
            storage.flush()
            if not self.save(worker, storage, step, attempt, run_id):
                return
        self.begin(worker, "end the attempt")
        end_attempt(storage.run, attempt, "finished")
        storage.flush(last=True)
        self.begin(worker, "give back")
        lease.release()

    def save(self, worker: Worker, storage: S3Storage, step: int, attempt: int, run_id: str) -> bool:
        """Save as `CheckpointManager` does; False if the run is no longer this process's."""
        directory = storage.run.get_checkpoint_dir(step, attempt)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "fragments_00000.safetensors").write_bytes(b"weights")
        if self.is_taken(worker, storage, attempt, run_id):
            return False
        self.begin(worker, "upload")
        storage.upload_checkpoint_file(directory / "fragments_00000.safetensors", lambda _count: None)
        if self.is_taken(worker, storage, attempt, run_id):
            return False
        self.begin(worker, "commit")
        storage.commit_manifest(directory / "manifest.json", json.dumps({"run_id": run_id, "step": step}))
        return True

    def is_taken(self, worker: Worker, storage: S3Storage, attempt: int, run_id: str) -> bool:
        """Look as `CheckpointManager` does, and check that a loss of the run that was there is seen."""
        self.begin(worker, "look")
        newest, current = self.find_newest_attempt(), self.find_run_id()
        storage.refresh_directory(storage.run.attempts_dir)
        taken = find_takeover(storage.run, attempt, run_id)
        assert taken or (newest <= attempt and current == run_id), f"attempt {attempt} goes on beside {newest}"
        return taken is not None

    def begin(self, worker: Worker, operation: str) -> None:
        worker.began_to, worker.began_at = operation, self.writes

    def find_run_id(self) -> str:
        first = self.store.objects.get(f"{PREFIX}attempts/0001.json")
        return str(json.loads(first.body)["run_id"]) if first else ""

    def find_newest_attempt(self) -> int:
        return max((int(key[-9:-5]) for key in self.store.objects if "/attempts/" in key), default=0)

    def note_listing(self, process: SimulatedProcess | None, prefix: str) -> None:
        if process is not None and prefix == f"{PREFIX}claims/":
            claims = {key: found for key, found in self.store.objects.items() if key.startswith(prefix)}
            ages = {key: self.store.now - found.written for key, found in claims.items()}
            self.workers[process].claims_seen = ages

    def check_write(self, write: Write) -> None:
        """Check a write before it is done, in the thread of its process."""
        self.writes += 1
        if write.process is None or write.body is None:
            return
        worker, before = self.workers[write.process], self.store.objects.get(write.key)
        key = write.key.removeprefix(PREFIX)
        if key.startswith("claims/"):
            self.check_claim(worker, write, before.body if before else None)
        elif key.startswith("attempts/") and before is not None:
            assert json.loads(before.body)["run_id"] == json.loads(write.body)["run_id"], "another run's attempt"
        if self.is_replaced(worker):
            # One operation may be under way: no store has a condition on another object.
            assert worker.began_at <= self.removed_at, f"{write.key} is written into a later run ({worker.began_to})"
            assert not key.startswith(("claims/", "attempts/")), f"{write.key} is written into a later run"
            self.has_late_write = True

    def check_claim(self, worker: Worker, write: Write, before: bytes | None) -> None:
        assert write.body is not None
        if before is not None:
            assert json.loads(before)["token"] == json.loads(write.body)["token"], "another's claim is overwritten"
            return
        claims = [key for key in self.store.objects if key.startswith(f"{PREFIX}claims/")]
        newest = max(claims, default="")
        if newest and newest < write.key:
            assert worker.claims_seen is not None
            is_over = "given_back" in json.loads(self.store.objects[newest].body)
            assert is_over or worker.claims_seen[newest] >= EXPIRES_AFTER - CLOCK_ERROR, "a living holder is robbed"

    def check_run(self) -> None:
        """Check the run as the next start would find it."""
        if self.has_late_write:
            return
        reader = S3Storage(self.store.connect(self.client), Path(tempfile.mkdtemp(dir=self.directory)) / "run")
        reader.refresh_directory(reader.run.path)
        run = reader.run
        records = [json.loads(path.read_text()) for path in run.attempts_dir.glob("*.json")]
        manifests = [json.loads(path.read_text()) for path in run.checkpoints_dir.glob("*/manifest.json")]
        assert len({record["run_id"] for record in records}) <= 1
        assert {manifest["run_id"] for manifest in manifests} <= {record["run_id"] for record in records}
        self.check_lineage(run)
        self.check_metrics({record["run_id"] for record in records})

    def check_lineage(self, run: RunDirectory) -> None:
        """Every step went once into the newest checkpoint."""
        if (newest := find_latest_checkpoint(run.checkpoints_dir)) is not None:
            spans = read_attempt_spans(run, newest.name)
            assert [span.after_step for span in spans] == [0, *(span.last_step for span in spans[:-1])]

    def check_metrics(self, run_ids: set[str]) -> None:
        """The segments join without gap or double."""
        stored = {key.removeprefix(PREFIX): found.body for key, found in self.store.objects.items()}
        sizes = {key: len(body) for key, body in stored.items()}
        segments = group_segments_by_file(sizes).get("metrics.jsonl", [])
        assert [segment.start for segment in segments] == [0, *(segment.end for segment in segments)][:-1][
            : len(segments)
        ]
        text = b"".join(stored[f"metrics.jsonl.{segment.start:015d}"] for segment in segments)
        rows = [json.loads(line) for line in text.splitlines()]
        assert {row["run_id"] for row in rows} <= run_ids
        assert len({(row["step"], row["attempt"]) for row in rows}) == len(rows)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_one_owner_writes_whatever_dies_sleeps_or_is_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setattr(leases, "_LOOK_EVERY", 0.0)
    # Each process on a machine of its own.
    monkeypatch.setattr(
        leases,
        "_get_process_identity",
        lambda: f"{process.name}/pid/1@1" if (process := find_process()) else "test/pid/1@1",
    )
    StoreSimulation.client = S3Client(ADDRESS)
    how = settings(
        max_examples=60, stateful_step_count=60, derandomize=True, database=None, deadline=None, phases=[Phase.generate]
    )
    run_state_machine_as_test(StoreSimulation, settings=how)
