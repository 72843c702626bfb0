"""Simulation of commands that work on one run in a store: whatever dies, stops or is cut off, one of them writes.

A hypothesis state machine drives the lease, the storage and the attempts of a run. Drivers hold the lease and start
workers, as `ltt train` on Ray does; workers outlive them. Each request to the store may be the last of its process, get
lost, lose its answer or arrive twice. The seed is fixed, so that every session does the same steps.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

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
from llm_training_toolkit.runs.directory import RunDirectory, parse_checkpoint_name
from llm_training_toolkit.runs.storage.lease import CLAIMS, EXPIRES_AFTER, RENEWED_EVERY, is_lease_held
from llm_training_toolkit.runs.storage.open import join_run, lock_run, open_readonly
from llm_training_toolkit.runs.storage.s3_client import S3Client, StorageError
from s3_server import silent
from simulation import FATES, Fate, SimulatedProcess, SimulatedThread, patch_modules
from store_in_memory import StoredObject, StoreInMemory

ADDRESS = "s3://bucket/runs/simulated"
PREFIX = "runs/simulated/"
STEP_SECONDS = 10.0
MACHINES = ("one", "two", "three")


@dataclass
class Role:
    """What the simulation knows of a process."""

    kind: str
    life: int | None = None
    """Number of removals before the run that it knows."""
    claim: str = ""
    claimed_at: float | None = None
    attempt: int = 0
    shall_stop: bool = False
    driver: SimulatedProcess | None = None


class StoredRunSimulation(RuleBasedStateMachine):
    """One address, at which a run lives, is removed and is begun anew."""

    @initialize(is_begun=st.booleans())
    def make_store(self, is_begun: bool) -> None:
        self.resources = ExitStack()
        self.place = Path(tempfile.mkdtemp(dir="/dev/shm"))
        self.simulation = self.resources.enter_context(patch_modules())
        self.store = StoreInMemory(self.simulation, self.see_read, self.see_write)
        patch = self.resources.enter_context(pytest.MonkeyPatch.context())
        patch.setattr("boto3.client", lambda *_names, **_options: self.store)
        patch.setattr("tempfile.tempdir", str(self.place))
        self.life = 0
        self.roles: dict[SimulatedProcess, Role] = {}
        self.claim_writes: dict[str, list[float]] = {}
        self.broken: list[str] = []
        if is_begun:
            self.start_process("driver", MACHINES[0])
            self.simulation.pass_time(2 * STEP_SECONDS)

    def teardown(self) -> None:
        try:
            self.check_that_an_abandoned_run_is_taken_in_its_time()
        finally:
            self.resources.close()
            shutil.rmtree(self.place)

    # What processes do: as commands/train.py, launch/ray/controller.py and worker/main.py.

    def drive(self, process: SimulatedProcess) -> str:
        """Hold the lease, and start a worker whenever there is none."""
        try:
            with lock_run(ADDRESS, silent) as run:
                self.roles[process].claimed_at = self.simulation.now
                (run.path / "resolved.json").write_text(json.dumps({"started_by": process.number}))
                run.storage.flush()
                while True:
                    run.check_lock()
                    self.see_start_of_workers(process)
                    worker = self.start_process("worker", process.machine)
                    self.roles[worker].driver = process
                    while worker.is_alive:
                        self.simulation.sleep(5.0)
                    if worker.result is not None:
                        return f"its worker ended: {worker.result}"
                    run.storage.refresh_directory(run.path)
        except (LaunchError, StorageError) as error:
            return str(error)

    def work(self, process: SimulatedProcess) -> str | None:
        """Train as one attempt."""
        try:
            with join_run(ADDRESS, silent) as run:
                role = self.roles[process]
                role.attempt = begin_attempt(run, {"worker": process.number})
                run_id = str(read_attempt_record(run, role.attempt)["run_id"])
                newest = find_latest_checkpoint(run.checkpoints_dir)
                update_attempt(run, role.attempt, resumed=newest.name if newest else None)
                found = parse_checkpoint_name(newest) if newest else None
                return self.train(run, role, run_id, found[0] if found else 0)
        except (LaunchError, OSError):
            return None  # the driver starts another

    def train(self, run: RunDirectory, role: Role, run_id: str, step: int) -> str:
        attempt, driver = role.attempt, role.driver
        assert driver is not None
        while not self.roles[driver].shall_stop:
            self.simulation.sleep(STEP_SECONDS)
            step += 1
            with run.metrics_path.open("a") as file:
                file.write(json.dumps({"step": step, "attempt": attempt}) + "\n")
            if takeover := self.find_takeover(run, attempt, run_id):
                return takeover
            directory = run.get_checkpoint_dir(step, attempt)
            directory.mkdir(parents=True)
            (directory / "rank_0").write_text(str(step))
            run.storage.upload_checkpoint_file(directory / "rank_0", lambda _bytes: None)
            if takeover := self.find_takeover(run, attempt, run_id):
                return takeover
            run.storage.commit_manifest(directory / "manifest.json", json.dumps({"run_id": run_id}))
        end_attempt(run, attempt, "stopped")
        return "stopped"

    def find_takeover(self, run: RunDirectory, attempt: int, run_id: str) -> str | None:
        """As `CheckpointManager` does before it writes."""
        with suppress(StorageError):
            run.storage.refresh_directory(run.attempts_dir)
        return find_takeover(run, attempt, run_id)

    # What is watched.

    def see_start_of_workers(self, driver: SimulatedProcess) -> None:
        """Only the holder of the lease starts workers: theirs would take the run from those of the holder."""
        claims, role = self.list_keys(CLAIMS), self.roles[driver]
        held = claims and json.loads(self.store.objects[PREFIX + claims[-1]].body).get("process") == driver.identity
        if not held:
            self.broken.append(f"{driver} started workers without {role.claim}")

    def see_read(self, thread: SimulatedThread, key: str) -> None:
        """A thread now knows which life of the run the store holds, and its newest attempt."""
        newest, role = self.find_newest_attempt(), self.roles[thread.process]
        if key in {f"{PREFIX}attempts/0001.json", f"{PREFIX}attempts/", PREFIX}:
            thread.newest_seen = (self.life, newest)
        if key == f"{PREFIX}attempts/0001.json" and newest and role.life is None:
            role.life = self.life

    def see_write(self, thread: SimulatedThread, key: str, before: StoredObject | None) -> None:
        relative, role = key.removeprefix(PREFIX), self.roles[thread.process]
        content = self.store.objects[key].body
        if relative.startswith(CLAIMS):
            self.see_claim(thread.process, relative, content, before)
            return
        newest = self.find_newest_attempt()
        if relative.startswith("attempts/") and before is None:
            if int(relative[9:13]) != newest or newest != len(self.list_keys("attempts/")):
                self.broken.append(f"{relative} was created out of order")
            role.life = self.life if role.life is None else role.life
        if before is not None and relative.startswith("attempts/"):
            fields = [{key: json.loads(each)[key] for key in ("run_id", "worker")} for each in (before.body, content)]
            if fields[0] != fields[1]:
                self.broken.append(f"{relative} of {fields[0]} was overwritten by {fields[1]}")
        life, newest_attempt = thread.newest_seen or (None, 0)
        if role.life not in {None, self.life} and life == self.life:
            self.broken.append(f"a {role.kind} of an earlier run wrote {relative} into the new one, which it had seen")
        if relative.endswith("manifest.json") and newest_attempt > role.attempt:
            self.broken.append(f"attempt {role.attempt} wrote {relative} after it had seen attempt {newest_attempt}")

    def see_claim(self, process: SimulatedProcess, key: str, content: bytes, before: StoredObject | None) -> None:
        """The lease is taken when it is given back, expired, or of a dead process of the same machine."""
        role, record = self.roles[process], json.loads(content)
        if before is not None:
            if json.loads(before.body).get("token") != record.get("token"):
                self.broken.append(f"{key} was overwritten by another process")
            self.claim_writes[key].append(self.simulation.now)
            return
        earlier = [each for each in self.list_keys(CLAIMS) if each < key]
        self.claim_writes[key], role.claim = [self.simulation.now], key
        if not earlier:
            return
        found = json.loads(self.store.objects[PREFIX + earlier[-1]].body)
        holder = next(each for each in self.roles if each.identity == found["process"])
        writes = [*self.claim_writes[earlier[-1]], self.simulation.now]
        silence = max(later - first for first, later in pairwise(writes[-3:]))  # it may have come back a moment ago
        is_known_dead = holder.machine == process.machine and not holder.is_alive
        if "given_back" not in found and silence < EXPIRES_AFTER - 1 and not is_known_dead:
            self.broken.append(f"{key} was taken from a holder that was silent for {silence:.0f} s alone")

    def list_keys(self, below: str) -> list[str]:
        return sorted(key.removeprefix(PREFIX) for key in self.store.objects if key.startswith(PREFIX + below))

    def find_newest_attempt(self) -> int:
        return max((int(key[9:13]) for key in self.list_keys("attempts/")), default=0)

    # What may happen.

    def start_process(self, kind: str, machine: str) -> SimulatedProcess:
        process = self.simulation.start(machine, self.drive if kind == "driver" else self.work)
        self.roles[process] = Role(kind)
        return process

    def list_alive(self, kind: str = "") -> list[SimulatedProcess]:
        return [each for each, role in self.roles.items() if each.is_alive and kind in {"", role.kind}]

    @precondition(lambda self: len(self.list_alive("driver")) < 3)
    @rule(machine=st.sampled_from(MACHINES))
    def give_the_command(self, machine: str) -> None:
        self.start_process("driver", machine)

    @precondition(lambda self: self.simulation.list_ready())
    @rule(data=st.data(), requests=st.integers(1, 12))
    def go_on(self, data: st.DataObject, requests: int) -> None:
        thread = data.draw(st.sampled_from(self.simulation.list_ready()))
        for _ in range(requests):
            if thread.can_go_on():
                self.simulation.advance(thread)

    @precondition(lambda self: self.simulation.list_ready())
    @rule(data=st.data(), fate=st.sampled_from(FATES))
    def go_wrong(self, data: st.DataObject, fate: Fate) -> None:
        self.simulation.advance(data.draw(st.sampled_from(self.simulation.list_ready())), fate)

    @precondition(lambda self: self.list_alive())
    @rule(data=st.data())
    def kill(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(self.list_alive())).kill()

    @precondition(lambda self: self.list_alive())
    @rule(data=st.data())
    def stop_or_continue(self, data: st.DataObject) -> None:
        process = data.draw(st.sampled_from(self.list_alive()))
        process.is_stopped = not process.is_stopped

    @precondition(lambda self: self.list_alive("driver"))
    @rule(data=st.data())
    def ask_to_stop(self, data: st.DataObject) -> None:
        self.roles[data.draw(st.sampled_from(self.list_alive("driver")))].shall_stop = True

    @rule(seconds=st.sampled_from([1.0, 7.0, 30.0, 75.0]))
    def pass_time(self, seconds: float) -> None:
        self.simulation.pass_time(seconds)

    @precondition(lambda self: self.find_newest_attempt())
    @rule()
    def remove_the_run(self) -> None:
        self.store.objects.clear()
        self.claim_writes.clear()
        self.life += 1

    # What must hold.

    @invariant()
    def nothing_was_broken(self) -> None:
        assert self.broken == []

    @invariant()
    def one_run_id(self) -> None:
        ids = {json.loads(self.store.objects[PREFIX + key].body)["run_id"] for key in self.list_keys("attempts/")}
        assert len(ids) <= 1

    def check_that_an_abandoned_run_is_taken_in_its_time(self) -> None:
        """With all commands gone a new one takes the lease within a minute, and the run from workers that are left."""
        for process in self.list_alive():
            process.is_stopped = False
            if self.roles[process].kind == "driver":
                process.kill()
        before, attempts = self.simulation.now, self.find_newest_attempt()
        driver = self.start_process("driver", "another")
        self.simulation.pass_time(EXPIRES_AFTER + 5 * STEP_SECONDS)
        claimed_at = self.roles[driver].claimed_at
        assert claimed_at is not None, driver.result
        assert claimed_at - before <= EXPIRES_AFTER + 2
        assert self.find_newest_attempt() > attempts
        assert all(self.roles[worker].driver is driver for worker in self.list_alive("worker"))
        assert is_lease_held(S3Client(ADDRESS))
        with open_readonly(ADDRESS) as run:
            newest = find_latest_checkpoint(run.checkpoints_dir)
            assert newest is not None
            spans = read_attempt_spans(run, newest.name)
            assert [span.after_step for span in spans] == [0, *(span.last_step for span in spans[:-1])]
            rows = {json.loads(line)["step"] for line in run.metrics_path.read_text().splitlines()}
            assert rows >= set(range(1, spans[-1].last_step + 1))
        assert self.broken == []


def test_one_process_writes_into_a_run_whatever_dies() -> None:
    how = settings(max_examples=30, stateful_step_count=40, derandomize=True, database=None, deadline=None)
    run_state_machine_as_test(StoredRunSimulation, settings=how)


def test_an_error_of_any_kind_ends_neither_renewals_nor_uploads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    said: list[str] = []
    with patch_modules() as simulation:
        store = StoreInMemory(simulation, lambda *_read: None, lambda *_written: None)
        monkeypatch.setattr("boto3.client", lambda *_names, **_options: store)

        def hold(_process: SimulatedProcess) -> None:
            with lock_run(ADDRESS, said.append) as run:
                (run.path / "resolved.json").write_text("{}")
                simulation.sleep(1000.0)

        simulation.start("one", hold)
        simulation.pass_time(3.0)
        store.error = RuntimeError("can't start new thread")
        simulation.pass_time(20.0)
        store.error = None
        simulation.pass_time(120.0)
        assert simulation.now - store.objects[f"{PREFIX}{CLAIMS}000001"].written <= RENEWED_EVERY
        assert f"{PREFIX}resolved.json" in store.objects
    assert [any(words in line for line in said) for words in ("renewed", "wait here", "takes metrics")] == 3 * [True]
