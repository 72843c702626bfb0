"""Shards and signatures made by processes of a Ray cluster are those of one process, and so are their errors."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import fork_server
from tiny_runs import write_corpus

_PREPARE = """
import sys
from io import StringIO
from pathlib import Path
from llm_training_toolkit.config import load_config
from llm_training_toolkit.monitoring.console import Console
from llm_training_toolkit.data.prepare import document_index
from llm_training_toolkit.data.dataset import PackedDataset
from llm_training_toolkit.data.prepare.builder import DatasetBuilder
from llm_training_toolkit.errors import ToolkitError
from llm_training_toolkit.data.prepare.epochs import get_tokenization_spec, prepare_epochs
from llm_training_toolkit.launch.backend import build_shard_runner, build_signature_runner
document_index._CHARACTERS_PER_SHARD = 1500
config = load_config(Path(sys.argv[1]), sys.argv[2:])
said = StringIO()
done = []
try:
    spec, runner = get_tokenization_spec(config), build_shard_runner(config, Console(said))
    signer = build_signature_runner(config, Console(said))
    work = DatasetBuilder(config, spec, lambda *event: done.append(event), runner, signer)
    prepared = prepare_epochs(work, config)
except ToolkitError as error:
    print("error", type(error).__name__, error)
    raise SystemExit
sequences = PackedDataset(prepared.dataset_info, global_batch=1, epochs=1)
print("shards", len(list((prepared.directory / "tokens").glob("tokens-*"))))
print("dropped", [source.dropped for source in prepared.dataset_info.sources])
print("progress", [event for event in done if event[0] == "tokens"][-1])
for step in range(sequences.total_steps):
    tokens = [example.tokens.tolist() for example in sequences.read_sequence_examples(step, 0)]
    print(step, sequences.get_document_spans(step), tokens)
print(said.getvalue(), file=sys.stderr)
"""


def prepared(config: Path, environment: Mapping[str, str], *overrides: str) -> tuple[str, str]:
    done = fork_server.run(asked(config, *overrides), capture_output=True, env=dict(environment))
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def asked(config: Path, *overrides: str) -> list[str]:
    return [sys.executable, "-c", _PREPARE, str(config), *overrides]


def test_a_cluster_renders_what_one_process_renders(
    ray_environment: Mapping[str, str], launch_config: Callable[..., Path], tmp_path: Path
) -> None:
    corpus = write_corpus(tmp_path / "code", documents=40)
    for number, file in enumerate(sorted(corpus.iterdir())[:3]):
        (corpus / f"near_{number}.py").write_text(f"{file.read_text()}\nlast_line()\n")
    source = [{"path": str(corpus), "format": "code"}]
    data = {"sources": source, "sequence_length": 64, "eval": {"fraction": 0.1}, "cache": str(tmp_path / "a")}
    data["near_duplicates"] = {}
    config = launch_config("spread", data=data, cluster={"workers": 2})
    # A start of its own: what imports write would be on the screen.
    first = subprocess.run(asked(config), capture_output=True, text=True, check=False, env=dict(ray_environment))
    assert first.returncode == 0, first.stderr
    spread, said = first.stdout, first.stderr
    alone, _ = prepared(config, ray_environment, "cluster.workers=0", f"data.cache={tmp_path / 'b'}")
    assert spread == alone
    assert int(spread.split()[1]) > 3
    assert "near_duplicate" in spread
    assert "this machine alone" not in said
    assert "ray.data" not in said
    assert "Progress bars" not in said
    (corpus / sorted(corpus.iterdir())[-1].name).write_bytes(b"\xff")
    broken, _ = prepared(config, ray_environment)
    assert broken.startswith("error DataError")
    assert "not UTF-8" in broken
