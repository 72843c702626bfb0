"""Lease on a run in a store: the claim object with the highest number owns the run; its renewal is the heartbeat.

    claims/000003      conditional create, so that only one process gets the number; rewritten every few seconds by its
                       holder, marked as given back at the end

A claim that is not renewed for a minute, by the store's own clock, belongs to a dead process: the next number takes
over the run. On the same machine a holder is dead as soon as its process is gone. Every write is conditional: a holder
that was suspended while its run was taken over, or removed and begun anew, changes no claim, and learns of it.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_training_toolkit.errors import LaunchError
from llm_training_toolkit.runs.storage.s3_client import CONDITIONAL_WRITES_HINT, S3Client, StorageError

CLAIMS = "claims/"
RENEWED_EVERY = 5.0  # seconds
# Seconds without renewal. If the store is unreachable for longer, another start may take over the run. Its attempt
# number then keeps the earlier process from saving.
EXPIRES_AFTER = 60.0
_LOOK_EVERY = 1.0
_NO_ETAG = f'"{"0" * 32}"'  # of no object
Say = Callable[[str], None]


@dataclass
class Lease:
    """Claim of this process on a run."""

    bucket: S3Client
    number: int
    record: dict[str, Any]
    etag: str
    """Version of the claim that this process wrote last."""
    renewals: int = 0

    def renew(self) -> bool:
        """Rewrite the claim; return False if the run was taken over or removed. Raises StorageError."""
        self.renewals += 1
        return self._rewrite({"renewals": self.renewals}) and not self._is_superseded()

    def is_lost(self) -> bool:
        """Return whether the run was taken over or removed; False if the store does not tell."""
        try:
            return not self.renew()
        except Exception:  # noqa: BLE001 - boto3 fails in ways of its own, and a doubt must not end a healthy run
            return False

    def release(self) -> None:
        """Mark the claim as given back, if it is still this one's. Raises StorageError."""
        self._rewrite({"given_back": True})

    def _rewrite(self, fields: dict[str, Any]) -> bool:
        """Rewrite the claim with these fields; return False if it is another's or gone. Raises StorageError."""
        key, content = _build_lease_key(self.number), json.dumps(self.record | fields).encode()
        token = self.record["token"]
        etag = self.bucket.replace_own_object(
            key, content, self.etag, lambda found: bool(json.loads(found).get("token") == token)
        )
        self.etag = etag or self.etag
        return etag is not None

    def _is_superseded(self) -> bool:
        return max(self.bucket.list_objects(CLAIMS), default="") > _build_lease_key(self.number)


@contextmanager
def hold_lease(bucket: S3Client, say: Say) -> Iterator[Lease]:
    """Hold the lease on a run for this process; first wait to see whether an earlier holder is alive.

    Raises LaunchError if it is, or if the store has no conditional writes; StorageError.
    """
    lease = acquire_lease(bucket, say)
    ending = threading.Event()
    renewing = threading.Thread(target=_renew_lease, args=(lease, ending, say), daemon=True, name="claim")
    renewing.start()
    try:
        yield lease
    finally:
        ending.set()
        renewing.join()
        with suppress(StorageError):  # the lease expires anyway
            lease.release()


def acquire_lease(bucket: S3Client, say: Say) -> Lease:
    """Claim the run, once an earlier holder has given it back or is dead. Raises as `hold_lease` does."""
    number = _wait_for_free_number(bucket, say)
    record = {"holder": _describe_holder(), "process": _get_process_identity(), "token": secrets.token_hex(8)}
    etag = bucket.put_object_if_absent(_build_lease_key(number), json.dumps(record).encode())
    if etag is None or not (lease := Lease(bucket, number, record, etag)).renew():
        raise LaunchError(_format_refusal(bucket, "another process has just started on it"))
    if bucket.put_object_if_unchanged(_build_lease_key(number), b'{"given_back": true}', _NO_ETAG) is not None:
        raise LaunchError(
            f"{bucket.address}: this store ignores conditional writes (If-Match). {CONDITIONAL_WRITES_HINT}"
        )
    bucket.delete_objects(key for key in bucket.list_objects(CLAIMS) if key < _build_lease_key(number))
    return lease


def is_lease_held(bucket: S3Client) -> bool:
    """Return whether a process holds the lease, as far as the last minute shows."""
    claims = bucket.list_objects(CLAIMS)
    if not claims:
        return False
    newest = max(claims)
    record = _read_lease(bucket, newest)
    return claims[newest].age < EXPIRES_AFTER and not _is_lease_over(record)


def _wait_for_free_number(bucket: S3Client, say: Say) -> int:
    """Return the next claim number, once the newest claim is given back, expired, or of a dead process."""
    first = ""
    while claims := bucket.list_objects(CLAIMS):
        newest = max(claims)
        record, claim = _read_lease(bucket, newest), claims[newest]
        is_own = record.get("process") == _get_process_identity()  # re-executed by launch/torchrun.py
        if is_own or _is_lease_over(record) or claim.age >= EXPIRES_AFTER:
            return 1 + int(newest.removeprefix(CLAIMS))
        if first and claim.etag != first:
            raise LaunchError(_format_refusal(bucket, record["holder"]))
        if not first:
            say(f"the run is claimed by {record['holder']}: waiting for up to a minute to see whether it is alive")
        first = claim.etag
        time.sleep(_LOOK_EVERY)
    return 1


def _renew_lease(lease: Lease, ending: threading.Event, say: Say) -> None:
    """Renew until `ending`, or until the run is another's; retry if the store does not answer."""
    while not ending.wait(RENEWED_EVERY):
        try:
            is_held = lease.renew()
        except StorageError:
            continue
        except Exception as error:  # noqa: BLE001 - the edge of a thread, without which the lease of a healthy run ends
            say(f"warning: the lease of this run could not be renewed ({type(error).__name__}: {error}); trying again")
            continue
        if not is_held:
            say("warning: this run was taken over, or removed; this process ends when it next saves")
            return


def _build_lease_key(number: int) -> str:
    return f"{CLAIMS}{number:06d}"


def _read_lease(bucket: S3Client, key: str) -> dict[str, Any]:
    found = bucket.get_object(key)
    record: dict[str, Any] = json.loads(found.body) if found is not None else {}
    return record


def _is_lease_over(record: dict[str, Any]) -> bool:
    """Return whether the claim itself is void: given back, or of a dead process of this machine."""
    if not record or "given_back" in record:
        return True
    machine, _, process = str(record["process"]).rpartition("/")
    own_machine = _get_process_identity().rpartition("/")[0]
    return machine == own_machine and not _is_process_alive(process)


def _describe_holder() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _get_process_identity() -> str:
    """Return an id that is never reused: boot id, container, process id and start time."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{Path('/proc/self/ns/pid').readlink()}/{os.getpid()}@{_read_start_ticks(os.getpid())}"


def _is_process_alive(process: str) -> bool:
    number, _, started = process.partition("@")
    return _read_start_ticks(int(number)) == started


def _read_start_ticks(number: int) -> str:
    """Return the start time of a process in clock ticks since boot; empty if there is no such process."""
    try:
        fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]  # a zombie is dead, though not reaped


def _format_refusal(bucket: S3Client, holder: str) -> str:
    return (
        f"run {bucket.address} is already running ({holder}): wait for it or stop it, or give this one another run.name"
    )
