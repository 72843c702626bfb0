"""A server of the S3 protocol, moto's, in a process of its own, with one bucket."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

_SERVE = """
import sys, time
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print("{}:{}".format(*server.get_host_and_port()), flush=True)
sys.stdin.read()
"""


@contextmanager
def s3_server() -> Iterator[dict[str, str]]:
    """The environment by which its bucket `bucket` is found."""
    with subprocess.Popen(
        [sys.executable, "-c", _SERVE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as server:
        assert server.stdout is not None
        environment = {
            "AWS_ENDPOINT_URL": f"http://{server.stdout.readline().strip()}",
            "AWS_ACCESS_KEY_ID": "anyone",
            "AWS_SECRET_ACCESS_KEY": "anything",
            "AWS_REGION": "us-east-1",
        }
        client(environment).create_bucket(Bucket="bucket")
        try:
            yield environment
        finally:
            server.kill()


@cache
def _client(address: str, key: str, secret: str, region: str) -> Any:
    """One client for each server: making one takes a tenth of a second of processor time."""
    import boto3

    return boto3.client(
        "s3", endpoint_url=address, region_name=region, aws_access_key_id=key, aws_secret_access_key=secret
    )


def client(environment: Mapping[str, str] | None = None) -> Any:
    """A client of the server that this process's environment, or another, names."""
    known = environment or os.environ
    names = ("ENDPOINT_URL", "ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "REGION")
    return _client(*(known[f"AWS_{name}"] for name in names))


def keys(below: str, environment: Mapping[str, str] | None = None) -> list[str]:
    """The keys in the bucket that begin with `below`, without it."""
    listed = client(environment).list_objects_v2(Bucket="bucket", Prefix=below).get("Contents", ())
    return [entry["Key"][len(below) :] for entry in listed]


def silent(_text: str) -> None:
    """Nobody listens to what a storage says."""


def below(address: str) -> str:
    """Prefix of the keys of a run at an address in the bucket."""
    return address.removeprefix("s3://bucket/") + "/"
