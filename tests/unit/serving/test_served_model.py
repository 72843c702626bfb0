"""Models of a server from a store: all that requests need is read before the local copy is removed."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm_training_toolkit.serving.served_model import ServedModel
from llm_training_toolkit.serving.settings import ServingSettings
from s3_server import client, s3_server


@pytest.mark.slow
def test_a_model_of_a_bucket_chats(
    model_directory: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with s3_server() as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        for file in model_directory.iterdir():
            client().upload_file(str(file), "bucket", f"tiny/export/{file.name}")
        model = ServedModel.open(ServingSettings("s3://bucket/tiny/export", "tiny", device="cpu"))
    assert model.describe_features()["chat"]
    assert model.describe_features()["tools"]
