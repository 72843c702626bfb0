"""A bucket for tests of storage, found by the usual environment variables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pytest

from s3_server import s3_server


@pytest.fixture(scope="session")
def s3() -> Iterator[Mapping[str, str]]:
    with s3_server() as environment:
        yield environment


@pytest.fixture
def bucket(s3: Mapping[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of an empty place in the bucket."""
    for name, value in s3.items():
        monkeypatch.setenv(name, value)
    place = tmp_path_factory.mktemp("place")
    monkeypatch.setattr("tempfile.tempdir", str(place))
    return f"s3://bucket/{place.name}/run"
