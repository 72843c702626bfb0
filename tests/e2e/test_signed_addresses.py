"""The signature of an address is in no file of the run that read behind it, and on no screen."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from ruamel.yaml import YAML

import fork_server
from launching import command, run_of

pytest.importorskip("aiohttp")
pytestmark = [pytest.mark.slow]
SECRET = "S3CR3T"
QUERY = f"X-Amz-Signature={SECRET}&x=1"


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    """The address of a file of code, of a held-out one and of a benchmark, without names and signatures."""

    class Silent(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - http.server's name
            """Nobody reads it."""

    folder = tmp_path / "served"
    folder.mkdir()
    for name in ("code", "held-out", "benchmark"):
        texts = [f"def {name}_{number}(value):\n    return value * {number} + {number}\n" * 9 for number in range(20)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Silent, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_signature_is_neither_stored_nor_shown(launch_config: Callable[..., Path], served: str) -> None:
    """Card, dataset info, configuration, TensorBoard, logs, evaluations and cache, from a file and an override."""
    config = launch_config("signed", train={"steps": 2}, cluster={"workers": 0}, export={"at_end": True})
    yaml = YAML()
    content = yaml.load(config)
    content["data"] |= {
        "sources": [{"path": f"{served}/code.jsonl?{QUERY}", "format": "text"}],
        "eval": {"sources": [{"path": f"{served}/held-out.jsonl?{QUERY}", "format": "text"}]},
        "decontamination": {"paths": [f"{served}/benchmark.jsonl?{QUERY}"]},
        "cache": str(config.parent / "signed-cache"),
    }
    task = {"task": "perplexity", "data": f"{served}/held-out.jsonl?{QUERY}"}
    content["eval"] = {"interval": 1, "tasks": [task]}
    with config.open("w") as file:
        yaml.dump(content, file)
    override = f"data.decontamination.paths=['{served}/benchmark.jsonl?{QUERY}&again=1']"
    done = fork_server.run(command(config, override), capture_output=True)
    assert done.returncode == 0, done.stderr
    run = run_of(config)
    assert f"{served}/code.jsonl" in (run.path / "export" / "README.md").read_text()
    assert list(run.path.glob("tb/events*"))
    assert list(run.path.glob("eval/**/*.json"))
    files = [each for folder in (run.path, config.parent / "signed-cache") for each in folder.rglob("*")]
    assert [each for each in files if each.is_file() and SECRET.encode() in each.read_bytes()] == []
    assert SECRET not in done.stdout + done.stderr
