"""Who works on a run in a store: numbered claims, the highest of which holds it, and its heartbeat.

    claims/000003      made by a conditional create, so that one of several gets the number; written again every few
                       seconds by its holder, marked as given back at the end

A claim that is not renewed for a minute, by the store's own clock, is that of a dead process: the next number takes the
run over. On the same machine a holder whose process is gone is known to be dead at once. Only creates are conditional:
a holder that wakes up after it was taken over renews its old claim, which nobody looks at, and learns that it has lost.
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
from pathlib import Path
from typing import Any

from llm_training_toolkit.errors import LaunchError
from llm_training_toolkit.runs.storage.s3_client import S3Client, StorageError

CLAIMS = "claims/"
RENEWED_EVERY = 5.0
"""Seconds."""
EXPIRES_AFTER = 60.0
"""Seconds without renewal. Of a store that is away for longer another start may take the run over: the number of its
attempt then keeps the earlier one from saving."""
_LOOK_EVERY = 1.0
Say = Callable[[str], None]


@contextmanager
def hold_lease(bucket: S3Client, say: Say) -> Iterator[None]:
    """Hold the run at an address for this process; waits to see whether an earlier holder is alive.

    Raises LaunchError when it is, or when the store keeps no conditional writes; StorageError.
    """
    number = _wait_for_free_number(bucket, say)
    record = {"holder": _describe_holder(), "process": _get_process_identity(), "token": secrets.token_hex(8)}
    is_ours = bucket.put_object_if_absent(_build_lease_key(number), json.dumps(record).encode()) is not None
    if not is_ours or max(bucket.list_objects(CLAIMS), default="") > _build_lease_key(number):
        raise LaunchError(_format_refusal(bucket, "another process has just started on it"))
    if bucket.put_object_if_absent(_build_lease_key(number), b'{"given_back": true}') is not None:
        raise LaunchError(
            f"{bucket.address}: this store ignores conditional writes (If-None-Match), so nothing would keep two "
            "processes out of one run. Set run.dir to a store that has them, or to a path"
        )
    bucket.delete_objects(key for key in bucket.list_objects(CLAIMS) if key < _build_lease_key(number))
    ending = threading.Event()
    renewing = threading.Thread(
        target=_renew_lease, args=(bucket, number, record, ending, say), daemon=True, name="claim"
    )
    renewing.start()
    try:
        yield
    finally:
        ending.set()
        renewing.join()
        with suppress(StorageError):  # it expires by itself
            bucket.put_object(_build_lease_key(number), json.dumps(record | {"given_back": True}).encode())


def is_lease_held(bucket: S3Client) -> bool:
    """Whether somebody works on the run, as far as the last minute shows."""
    claims = bucket.list_objects(CLAIMS)
    if not claims:
        return False
    newest = max(claims)
    record = _read_lease(bucket, newest)
    return claims[newest].age < EXPIRES_AFTER and not _is_lease_over(record)


def _wait_for_free_number(bucket: S3Client, say: Say) -> int:
    """The number of the next claim, once the newest is given back, expired, or its holder known to be dead."""
    first = ""
    while claims := bucket.list_objects(CLAIMS):
        newest = max(claims)
        record, claim = _read_lease(bucket, newest), claims[newest]
        is_own = record.get("process") == _get_process_identity()  # a run that has started itself again (launch.inline)
        if is_own or _is_lease_over(record) or claim.age >= EXPIRES_AFTER:
            return 1 + int(newest.removeprefix(CLAIMS))
        if first and claim.etag != first:
            raise LaunchError(_format_refusal(bucket, record["holder"]))
        if not first:
            say(f"the run is claimed by {record['holder']}: waiting for up to a minute to see whether it is alive")
        first = claim.etag
        time.sleep(_LOOK_EVERY)
    return 1


def _renew_lease(bucket: S3Client, number: int, record: dict[str, Any], ending: threading.Event, say: Say) -> None:
    """Write the claim again and again, each time another; a store that does not answer for a while is tried again."""
    renewals = 0
    while not ending.wait(RENEWED_EVERY):
        renewals += 1
        with suppress(StorageError):
            bucket.put_object(_build_lease_key(number), json.dumps(record | {"renewals": renewals}).encode())
            if max(bucket.list_objects(CLAIMS), default="") > _build_lease_key(number):
                say("warning: another process has taken over this run; this one ends when it next saves")
                return


def _build_lease_key(number: int) -> str:
    return f"{CLAIMS}{number:06d}"


def _read_lease(bucket: S3Client, key: str) -> dict[str, Any]:
    found = bucket.get_object(key)
    record: dict[str, Any] = json.loads(found.body) if found is not None else {}
    return record


def _is_lease_over(record: dict[str, Any]) -> bool:
    """Whether a claim says by itself that nobody holds it: given back, or of a process of this machine that is gone."""
    if not record or "given_back" in record:
        return True
    machine, _, process = str(record["process"]).rpartition("/")
    own_machine = _get_process_identity().rpartition("/")[0]
    return machine == own_machine and not _is_process_alive(process)


def _describe_holder() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _get_process_identity() -> str:
    """This process among all there ever were: boot of the machine, container, number and moment of its start."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{Path('/proc/self/ns/pid').readlink()}/{os.getpid()}@{_read_start_ticks(os.getpid())}"


def _is_process_alive(process: str) -> bool:
    number, _, started = process.partition("@")
    return _read_start_ticks(int(number)) == started


def _read_start_ticks(number: int) -> str:
    """When a process began, in clock ticks since the boot; empty where there is none of this number."""
    try:
        fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]  # a zombie is dead, whoever has not looked after it


def _format_refusal(bucket: S3Client, holder: str) -> str:
    return (
        f"run {bucket.address} is already running ({holder}): wait for it or stop it, or give this one another run.name"
    )
