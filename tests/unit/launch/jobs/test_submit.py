"""What travels with a job, and what a job was asked for."""

from __future__ import annotations

import json
import shlex
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from llm_training_toolkit.config import Config, load_config
from llm_training_toolkit.errors import LaunchError, PlanError
from llm_training_toolkit.launch.jobs.client import RayJob, connect_job_client
from llm_training_toolkit.launch.jobs.package import (
    check_no_shadowing_modules,
    check_package_size,
    find_excluded_secrets,
    get_exclude_patterns,
)
from llm_training_toolkit.launch.jobs.submit import parse_train_request, submit_job
from llm_training_toolkit.launch.request import TrainRequest
from llm_training_toolkit.monitoring.console import Console


def job(*words: str) -> RayJob:
    return RayJob("one-1", "one", "stopped", True, shlex.join(words), "", 0.0, 0.0, 75)


def test_a_job_is_resumed_with_all_that_it_was_asked_for() -> None:
    words = ["a b.yaml", "run.dir=/x y", "train.steps=3", "--accept", "optim.lr", "--accept", "documents", "--extend"]
    request = parse_train_request(job("exec", "ltt", "train", *words))
    assert request.config == Path("a b.yaml")
    assert request.overrides == ["run.dir=/x y", "train.steps=3"]
    assert request.accept == ["optim.lr", "documents"]
    assert request.extend
    assert not parse_train_request(job("exec", "ltt", "train", "a.yaml")).extend


@pytest.mark.parametrize("words", [["ltt", "train", "a.yaml"], ["exec", "ltt", "train"], ["python", "a.py"]])
def test_a_job_of_another_command_is_not_guessed_at(words: list[str]) -> None:
    with pytest.raises(LaunchError, match="was not submitted by `ltt submit`"):
        parse_train_request(job(*words))


def config_of(folder: Path, source: str) -> Config:
    sections = {
        "run": {"name": "one", "dir": str(folder / "all" / "my-runs")},
        "model": {"name": "qwen3-0.6b"},
        "tokenizer": {"path": "/elsewhere/tokenizer"},
        "data": {
            "sequence_length": 64,
            "sources": [{"path": source, "format": "text"}],
            "cache": str(folder / "prepared"),
        },
        "train": {"steps": 1, "global_batch_size": 1},
    }
    (folder / "a.yaml").write_text(json.dumps(sections))  # JSON is YAML
    return load_config(folder / "a.yaml")


def fill(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * 1000)


def test_only_code_travels(tmp_path: Path) -> None:
    fill(tmp_path, "src/b.py", "runs/one/metrics.jsonl", ".venv/lib/c.py", "model.safetensors", "data/d.txt")
    fill(
        tmp_path, "all/my-runs/one/config.yaml", "prepared/tokens.bin", "more/d.jsonl", "more/e.parquet", "f.jsonl.zst"
    )
    (tmp_path / ".gitignore").write_text("/data/\n")
    left_out = get_exclude_patterns(config_of(tmp_path, "/elsewhere/d.jsonl"), tmp_path)
    assert check_package_size(tmp_path, left_out).startswith("2 files, ")


def test_hidden_files_and_keys_stay_here_and_are_named(tmp_path: Path) -> None:
    secrets = [
        ".aws/credentials",
        ".env",
        ".netrc",
        ".ssh/id_ed25519",
        "id_rsa",
        "kubeconfig",
        "sub/.env",
        "server.pem",
    ]
    fill(tmp_path, "src/b.py", *secrets, ".venv/lib/c.pem", "runs/one/x.pem")
    for source in (".", "/elsewhere/d.jsonl"):
        left_out = get_exclude_patterns(config_of(tmp_path, source), tmp_path)
        assert check_package_size(tmp_path, left_out).startswith("2 files, "), "the code and its YAML file"
        named = [".aws/", ".env", ".netrc", ".ssh/", "id_rsa", "kubeconfig", "server.pem", "sub/.env"]
        assert find_excluded_secrets(tmp_path, left_out) == named


def test_modules_that_would_hide_pythons_own_are_refused(tmp_path: Path) -> None:
    fill(tmp_path, "sub/queue.py", "test/__init__.py", "types/data.txt", "sys.py", "my.py")
    left_out = get_exclude_patterns(config_of(tmp_path, "/elsewhere/d.jsonl"), tmp_path)
    check_no_shadowing_modules(tmp_path, left_out)
    fill(tmp_path, "html/__init__.py", "queue.py")
    with pytest.raises(PlanError, match=r"html/__init__\.py, queue\.py in the current folder"):
        check_no_shadowing_modules(tmp_path, left_out)
    check_no_shadowing_modules(tmp_path, [*left_out, "/html/", "queue.py"])


@pytest.mark.parametrize(("source", "count"), [("more/d.jsonl", 3), ("more", 4), (".", 5), ("hf://some/set", 2)])
def test_records_of_this_folder_travel_where_the_run_names_them(source: str, count: int, tmp_path: Path) -> None:
    fill(tmp_path, "src/b.py", "more/d.jsonl", "more/e.parquet", "f.jsonl.gz")
    assert check_package_size(tmp_path, get_exclude_patterns(config_of(tmp_path, source), tmp_path)).startswith(
        f"{count} files, "
    )


def test_a_folder_over_rays_limit_is_refused_with_what_is_large(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with (tmp_path / "data" / "tokens.bin").open("wb") as file:
        file.truncate(100 * 2**20)  # sparse: it takes no room
    with pytest.raises(
        PlanError, match=r"holds 1 file, 105 MB, a job carries less than 105 MB .* Largest: data 105 MB"
    ):
        check_package_size(tmp_path, [])


def test_more_workers_than_the_cluster_file_holds_are_refused_before_anybody_is_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = Path(__file__).parents[4]
    monkeypatch.chdir(root)
    request = TrainRequest(
        Path("configs/quickstart.yaml"), ["cluster.workers=64", "train.global_batch_size=64", "run.dir=/runs"]
    )
    with pytest.raises(PlanError, match=r"cluster\.workers"):
        submit_job(request, "http://127.0.0.1:1", Path("cluster/local.yaml"), Console())


@contextmanager
def answering(code: int, answer: object) -> Iterator[str]:
    """A server that gives one answer to every question."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """Say nothing."""

        def do_GET(self) -> None:
            body = json.dumps(answer).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    ("code", "answer", "words"),
    [
        (
            200,
            {"version": "4", "ray_version": "2.9.0", "ray_commit": ""},
            r"runs Ray 2\.9\.0, here is Ray .*: install ray==",
        ),
        (404, {}, r"cannot be reached: .*needs ray\[default\] on the head"),
    ],
)
def test_another_ray_and_a_head_without_a_job_server_are_said(code: int, answer: object, words: str) -> None:
    with answering(code, answer) as address, pytest.raises(LaunchError, match=words):
        connect_job_client(address)
