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
from llm_training_toolkit.runs.storage.s3_client import Bucket, StorageError

CLAIMS = "claims/"
RENEWED_EVERY = 5.0
"""Seconds."""
EXPIRES_AFTER = 60.0
"""Seconds without renewal. Of a store that is away for longer another start may take the run over: the number of its
attempt then keeps the earlier one from saving."""
_LOOK_EVERY = 1.0
Say = Callable[[str], None]


@contextmanager
def claimed(bucket: Bucket, say: Say) -> Iterator[None]:
    """Hold the run at an address for this process; waits to see whether an earlier holder is alive.

    Raises LaunchError when it is, or when the store keeps no conditional writes; StorageError.
    """
    number = _free_number(bucket, say)
    record = {"holder": _who(), "process": _process(), "token": secrets.token_hex(8)}
    is_ours = bucket.create(_key(number), json.dumps(record).encode()) is not None
    if not is_ours or max(bucket.listed(CLAIMS), default="") > _key(number):
        raise LaunchError(_refusal(bucket, "another process has just started on it"))
    if bucket.create(_key(number), b'{"given_back": true}') is not None:
        raise LaunchError(
            f"{bucket.address}: this store ignores conditional writes (If-None-Match), so nothing would keep two "
            "processes out of one run. Set run.dir to a store that has them, or to a path"
        )
    bucket.delete(key for key in bucket.listed(CLAIMS) if key < _key(number))
    ending = threading.Event()
    renewing = threading.Thread(target=_renew, args=(bucket, number, record, ending, say), daemon=True, name="claim")
    renewing.start()
    try:
        yield
    finally:
        ending.set()
        renewing.join()
        with suppress(StorageError):  # it expires by itself
            bucket.put(_key(number), json.dumps(record | {"given_back": True}).encode())


def is_held(bucket: Bucket) -> bool:
    """Whether somebody works on the run, as far as the last minute shows."""
    claims = bucket.listed(CLAIMS)
    if not claims:
        return False
    newest = max(claims)
    record = _read(bucket, newest)
    return claims[newest].age < EXPIRES_AFTER and not _is_over(record)


def _free_number(bucket: Bucket, say: Say) -> int:
    """The number of the next claim, once the newest is given back, expired, or its holder known to be dead."""
    first = ""
    while claims := bucket.listed(CLAIMS):
        newest = max(claims)
        record, claim = _read(bucket, newest), claims[newest]
        is_own = record.get("process") == _process()  # a run that has started itself again (launch.inline)
        if is_own or _is_over(record) or claim.age >= EXPIRES_AFTER:
            return 1 + int(newest.removeprefix(CLAIMS))
        if first and claim.mark != first:
            raise LaunchError(_refusal(bucket, record["holder"]))
        if not first:
            say(f"the run is claimed by {record['holder']}: waiting for up to a minute to see whether it is alive")
        first = claim.mark
        time.sleep(_LOOK_EVERY)
    return 1


def _renew(bucket: Bucket, number: int, record: dict[str, Any], ending: threading.Event, say: Say) -> None:
    """Write the claim again and again, each time another; a store that does not answer for a while is tried again."""
    renewals = 0
    while not ending.wait(RENEWED_EVERY):
        renewals += 1
        with suppress(StorageError):
            bucket.put(_key(number), json.dumps(record | {"renewals": renewals}).encode())
            if max(bucket.listed(CLAIMS), default="") > _key(number):
                say("warning: another process has taken over this run; this one ends when it next saves")
                return


def _key(number: int) -> str:
    return f"{CLAIMS}{number:06d}"


def _read(bucket: Bucket, key: str) -> dict[str, Any]:
    found = bucket.get(key)
    record: dict[str, Any] = json.loads(found.body) if found is not None else {}
    return record


def _is_over(record: dict[str, Any]) -> bool:
    """Whether a claim says by itself that nobody holds it: given back, or of a process of this machine that is gone."""
    if not record or "given_back" in record:
        return True
    machine, _, process = str(record["process"]).rpartition("/")
    own_machine = _process().rpartition("/")[0]
    return machine == own_machine and not _is_alive(process)


def _who() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _process() -> str:
    """This process among all there ever were: boot of the machine, container, number and moment of its start."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{Path('/proc/self/ns/pid').readlink()}/{os.getpid()}@{_started(os.getpid())}"


def _is_alive(process: str) -> bool:
    number, _, started = process.partition("@")
    return _started(int(number)) == started


def _started(number: int) -> str:
    """When a process began, in clock ticks since the boot; empty where there is none of this number."""
    try:
        fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]  # a zombie is dead, whoever has not looked after it


def _refusal(bucket: Bucket, holder: str) -> str:
    return (
        f"run {bucket.address} is already running ({holder}): wait for it or stop it, or give this one another run.name"
    )
