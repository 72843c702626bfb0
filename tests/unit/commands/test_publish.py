"""`ltt publish` against a server of the hub's protocol: what arrives, and what is refused before anything does."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard, close_session, constants
from safetensors.torch import save_file
from typer.testing import CliRunner

from hub_server import use_hub
from hub_uploads import OWNER, READ, WRITE, Repository, UploadHub, upload_hub
from llm_training_toolkit.cli.app import app
from llm_training_toolkit.commands import publish
from llm_training_toolkit.commands.publish import PublishRequest, PublishResult, publish_run
from llm_training_toolkit.errors import CheckpointError, ToolkitError
from llm_training_toolkit.evaluation.records import EvalRecord, write_eval_record
from llm_training_toolkit.runs.directory import RunDirectory

NAME = f"{OWNER}/tiny"
CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
---

# tiny

Trained on:

- `code`: 60 documents

```python
AutoModelForCausalLM.from_pretrained("PATH OF THIS DIRECTORY")
```
"""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[UploadHub]:
    """A hub whose token may write."""
    with upload_hub() as state:
        use_hub(state.endpoint, monkeypatch)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(
            constants, "HF_HUB_DISABLE_XET", True
        )  # the hub's other way to upload has a server of its own
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setenv("HF_TOKEN", WRITE)
        yield state
        close_session()


@pytest.fixture
def exported(fresh_run: Callable[[str], RunDirectory]) -> RunDirectory:
    """A run with an export of step 9, evaluated at this step and at another."""
    run = fresh_run("tiny")
    run.export_dir.mkdir()
    save_file({"weight": torch.arange(6.0)}, run.export_dir / "model.safetensors")
    (run.export_dir / "config.json").write_text("{}")
    (run.export_dir / "README.md").write_text(CARD)
    (run.export_dir / "training.json").write_text(json.dumps({"checkpoint": "step_000000009_a1", "run": "tiny"}))
    for step, value in ((9, 0.25), (5, 0.125)):
        record = EvalRecord(
            "infill", {"exact_match": value, "documents": 8}, "/data/held", {}, None, "tiny", step, "2026-12-01"
        )
        write_eval_record(run, record, [])
    return run


def published(run: RunDirectory, **fields: Any) -> PublishResult:
    return publish_run(PublishRequest(run, **{"repository": NAME} | fields), lambda _: None)


def test_an_export_arrives_with_its_card(hub: UploadHub, exported: RunDirectory) -> None:
    done = published(exported, licence="apache-2.0")
    repository = hub.repositories[NAME]
    assert repository.private
    assert (done.public, done.files, done.commit) == (False, 4, repository.commit)
    assert done.address == f"{hub.endpoint}/{NAME}"
    assert repository.commits == ["tiny, step 9"]
    for name in ("model.safetensors", "config.json", "training.json"):
        assert repository.files[name] == (exported.export_dir / name).read_bytes()
    assert len(hub.objects) == 1
    card = ModelCard(repository.files["README.md"].decode())
    assert (card.data.get("license"), card.data.get("library_name")) == ("apache-2.0", "transformers")
    assert f'from_pretrained("{NAME}")' in card.text
    assert "| infill | exact_match | 0.2500 | held |" in card.text
    assert "0.1250" not in card.text, "of another step"


def test_a_second_publication_replaces_the_first(hub: UploadHub, exported: RunDirectory) -> None:
    published(exported)
    files = hub.repositories[NAME].files
    files["LICENSE"] = b"added by its owner"
    (exported.export_dir / "model.safetensors").rename(exported.export_dir / "model-00001-of-00001.safetensors")
    published(exported)
    assert {"README.md", ".gitattributes", "LICENSE", "model-00001-of-00001.safetensors"} <= files.keys()
    assert "model.safetensors" not in files


def test_an_upload_that_broke_off_is_taken_up(hub: UploadHub, exported: RunDirectory) -> None:
    hub.breaks_at = "/commit/"
    with pytest.raises(ToolkitError) as caught:
        published(exported)
    assert caught.value.problems[0].code == "hub-refused"
    hub.breaks_at = ""
    published(exported)
    assert "model.safetensors" in hub.repositories[NAME].files


def other_content(hub: UploadHub) -> None:
    hub.repositories[NAME] = Repository(True, {"pytorch_model.bin": b"of another"})


def public_already(hub: UploadHub) -> None:
    hub.repositories[NAME] = Repository(False, {"training.json": b"{}"})


def of_another_run(hub: UploadHub) -> None:
    origin = {"checkpoint": "step_000000002_a1", "run": "other"}
    hub.repositories[NAME] = Repository(True, {"training.json": json.dumps(origin).encode()})


def of_an_unnamed_run(hub: UploadHub) -> None:
    hub.repositories[NAME] = Repository(True, {"training.json": b'{"checkpoint": "step_000000002_a1"}'})


def nothing(_: UploadHub) -> None:
    pass


@pytest.mark.parametrize(
    ("code", "token", "prepare", "fields"),
    [
        ("hub-login", "", nothing, {}),
        ("hub-rights", "unknown", nothing, {}),
        ("hub-rights", READ, nothing, {}),
        ("hub-rights", WRITE, nothing, {"repository": "others/tiny"}),
        ("repository-name", WRITE, nothing, {"repository": "a/b/c"}),
        ("repository-with-other-content", WRITE, other_content, {}),
        ("repository-visibility", WRITE, public_already, {}),
        ("repository-of-another-run", WRITE, of_another_run, {}),
        ("repository-of-another-run", WRITE, of_an_unnamed_run, {}),
    ],
)
def test_refusals_change_nothing(
    hub: UploadHub,
    exported: RunDirectory,
    monkeypatch: pytest.MonkeyPatch,
    code: str,
    token: str,
    prepare: Callable[[UploadHub], None],
    fields: dict[str, Any],
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    prepare(hub)
    before = {name: dict(repository.files) for name, repository in hub.repositories.items()}
    with pytest.raises(ToolkitError) as caught:
        published(exported, **fields)
    assert [problem.code for problem in caught.value.problems] == [code]
    assert {name: repository.files for name, repository in hub.repositories.items()} == before


def test_the_export_of_another_run_is_replaced_when_told(hub: UploadHub, exported: RunDirectory) -> None:
    of_another_run(hub)
    published(exported, replace=True)
    files = hub.repositories[NAME].files
    assert "model.safetensors" in files
    assert json.loads(files["training.json"])["run"] == "tiny"


def test_a_base_without_a_licence_needs_one(hub: UploadHub, exported: RunDirectory, tmp_path: Path) -> None:
    base = tmp_path / "base"
    text = exported.resolved_config_path.read_text()
    resolved = json.loads(text)
    resolved["model"] |= {"path": str(base), "config_overrides": {}}
    exported.resolved_config_path.write_text(json.dumps(resolved))
    with pytest.raises(ToolkitError) as caught:
        published(exported)
    assert caught.value.problems[0].code == "no-licence"
    assert not hub.repositories
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: bigcode-openrail-m\n---\n# base\n")
    assert published(exported).licence == "bigcode-openrail-m"
    assert str(base) not in hub.repositories[NAME].files["README.md"].decode()


@pytest.mark.parametrize("missing", ["training.json", "README.md"])
def test_only_a_complete_export_is_published(hub: UploadHub, exported: RunDirectory, missing: str) -> None:
    (exported.export_dir / missing).unlink()
    with pytest.raises(CheckpointError, match="no complete export"):
        published(exported)
    assert not hub.requests


def test_no_answer_is_no_wait(hub: UploadHub, exported: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publish, "_PATIENCE_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for port in (silent.getsockname()[1], 9):
            monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
            with pytest.raises(ToolkitError) as caught:
                published(exported)
            assert caught.value.problems[0].code == "hub-unreachable"


def test_the_command_prints_the_result(hub: UploadHub, exported: RunDirectory) -> None:
    command = ["publish", str(exported.path), "--repo", NAME, "--public", "--json"]
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert done.exit_code == 0
    found = json.loads(done.stdout)
    assert (found["public"], found["files"]) == (True, 4)
    assert not hub.repositories[NAME].private
