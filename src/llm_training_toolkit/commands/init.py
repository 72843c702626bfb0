"""`ltt init`: a commented configuration that fits this machine, checked before it is printed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llm_training_toolkit.config import Config
from llm_training_toolkit.config.load import parse_config
from llm_training_toolkit.errors import PlanError
from llm_training_toolkit.families import ModelSize, find_size, find_size_of_weights, has_known_name
from llm_training_toolkit.plan import estimate_memory, make_plan, plan_workload
from llm_training_toolkit.runs.directory import RunDirectory

StarterKind = Literal["chat", "code", "text", "scratch"]
DocumentKind = Literal["chat", "code", "text"]
_SMALL_MODEL = {  # of the quickstart: learns something in minutes on two cores
    "num_hidden_layers": 4,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
_LINE_WIDTH = 110


@dataclass(frozen=True)
class TrainingMachine:
    """GPUs and memory that the starter configuration has to fit."""

    gpus: int
    memory_gb: float
    """Memory of one GPU, or of the machine without one."""

    @property
    def description(self) -> str:
        """Text for a comment."""
        if not self.gpus:
            return f"no GPU, {self.memory_gb:.0f} GB of memory"
        return f"{self.gpus} GPU{'s' if self.gpus > 1 else ''} of {self.memory_gb:.0f} GB"


@dataclass(frozen=True)
class StarterRequest:
    """Arguments of `ltt init`."""

    kind: StarterKind
    model: str
    """Hub id, directory or known size."""
    data: str
    name: str | None = None


def detect_machine() -> TrainingMachine:
    """Return this machine's GPUs, or its memory. Asks nvidia-smi, because importing torch takes seconds."""
    command = shutil.which("nvidia-smi")
    if command is not None:
        query = [command, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
        done = subprocess.run(query, capture_output=True, text=True, check=False, timeout=20)
        sizes = [float(line) for line in done.stdout.split("\n") if re.fullmatch(r"\s*\d+\s*", line)]
        if done.returncode == 0 and sizes:
            return TrainingMachine(len(sizes), min(sizes) * 2**20 / 1e9)
    return TrainingMachine(0, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9)


def format_starter_config(request: StarterRequest, machine: TrainingMachine) -> str:
    """Return the YAML text of a run that plans without problems, except for weights still to be fetched.

    Raises PlanError for an unknown model, and with the plan's problems.
    """
    if request.kind != "scratch" and "/" in request.model and not has_known_name(request.model):
        from llm_training_toolkit.setup.hub_weights import ask_for_size  # huggingface_hub takes over a second to import

        ask_for_size(_parse(_start_config(request)))
    saved = find_size_of_weights(request.model) if request.kind != "scratch" else None
    size = saved or find_size(request.model)
    if request.kind != "scratch" and "/" not in request.model and not Path(request.model).is_dir():
        raise PlanError(
            f"--model {request.model}: no directory here and no hub id: give OWNER/{request.model}, such as "
            "Qwen/Qwen3-0.6B, or the directory of the weights"
        )
    if request.kind == "scratch":
        return _format_scratch(request, size, machine)
    return _format_finetuning(request, request.kind, size, machine)


def _format_finetuning(request: StarterRequest, kind: DocumentKind, size: ModelSize, machine: TrainingMachine) -> str:
    length = 512 if not machine.gpus else 2048 if kind == "chat" else 4096
    source: dict[str, Any] = {"path": request.data, "format": kind}
    if kind == "code" and size.family.special_tokens.has_fim:
        source["fim"] = {"rate": 0.5}
    data = _start_config(request)
    data["run"] = {"name": request.name or f"{_name_base(request.model, size)}-{kind}"}
    data["data"] = {"sequence_length": length, "sources": [source]}
    data["cluster"] = {"workers": max(machine.gpus, 1)}
    needed = _estimate_memory_gb(data)
    method = f"Full training: about {needed:.2g} GB of memory a worker, by the plan"
    if needed > machine.memory_gb:
        data["model"]["lora"] = {"rank": 32, "alpha": 32}
        taken = _estimate_memory_gb(data)
        method = f"LoRA takes about {taken:.2g} GB of memory a worker, full training {needed:.3g}, by the plan"
    notes = {
        "run": "The directory below runs/. The same command resumes it.",
        "model": f"{method}.",
        "data": _describe_source(source),
        "train": "One step learns from global_batch_size sequences, on any number of workers.",
        "cluster": f"One worker for each GPU, or one without. Made for this machine: {machine.description}.",
    }
    return _render(data, notes)


def _name_base(model: str, size: ModelSize) -> str:
    """Return the name of the weights; those of an export, a folder `export`, are named after its run."""
    path = Path(model).absolute()
    return path.parent.name if path.name == RunDirectory(path.parent).export_dir.name else size.name


def _start_config(request: StarterRequest) -> dict[str, Any]:
    """Return a run from the weights of the request, without what depends on them and on the machine."""
    return {
        "run": {"name": "starter"},
        "model": {"path": request.model},
        "data": {"sequence_length": 512, "sources": [{"path": request.data, "format": "text"}]},
        "train": {"epochs": 2, "global_batch_size": 16},
    }


def _format_scratch(request: StarterRequest, size: ModelSize, machine: TrainingMachine) -> str:
    overrides = dict(_SMALL_MODEL) if size.family.name.startswith("qwen3") else {"num_hidden_layers": 4}
    data: dict[str, Any] = {
        "run": {"name": request.name or f"{size.name}-scratch"},
        "model": {"name": size.name} if machine.gpus else {"name": size.name, "config_overrides": overrides},
        "tokenizer": {"train": {"vocab_size": 4096 if not machine.gpus else 32_768}},
        "data": {
            "sequence_length": 256 if not machine.gpus else 2048,
            "sources": [{"path": request.data, "format": "code" if request.data == "python:stdlib" else "text"}],
        },
        "train": {"tokens": 500_000 if not machine.gpus else 1_000_000_000, "global_batch_size": 8},
        "cluster": {"workers": max(machine.gpus, 1)},
    }
    notes = {
        "run": "The directory below runs/. The same command resumes it.",
        "model": "From random weights. config_overrides changes the size; without it: the published one.",
        "tokenizer": "Trained on the documents below.",
        "data": _describe_source(data["data"]["sources"][0]),
        "train": "The length in tokens; `steps` or `epochs` in its place are possible.",
        "cluster": f"One worker for each GPU, or one without. Made for this machine: {machine.description}.",
    }
    return _render(data, notes)


def format_starter_search(base: str) -> str:
    """Return the YAML text of a search over the learning rate of a run's configuration."""
    name = Path(base).stem
    return (
        "# Learning rate by ASHA: weak trials end early. `ltt tune FILE` starts it, and resumes it.\n"
        f"base: {base}\n"
        f"name: {name}-search\n"
        "overrides: {cluster.workers: 1}  # of every trial\n"
        "search:\n"
        "  optim.lr: {loguniform: [1e-5, 1e-2]}\n"
        "metric: eval/loss\n"
        "trials: 12\n"
        "scheduler: {name: asha, reduction_factor: 4}\n"
    )


def _describe_source(source: dict[str, Any]) -> str:
    what = {
        "chat": "Conversations: one JSON object a line, with messages of role and content",
        "code": "A folder of code, or files of records",
        "text": "Text: files, or records with a field `text`",
    }[source["format"]]
    middle = "; half of the documents as fill-in-the-middle" if "fim" in source else ""
    return f"{what}{middle}. One in a hundred is held out."


def _estimate_memory_gb(data: dict[str, Any]) -> float:
    config = _parse(data)
    workload = plan_workload(config, max(config.cluster.min_workers, 1))
    return sum(estimate_memory(workload).to_gigabytes().values())


def _parse(data: dict[str, Any]) -> Config:
    # A directory that holds no run, so that none of the same name gives its plan.
    return parse_config({**data, "run": {**data["run"], "dir": os.devnull}}, "ltt init")


def _render(data: dict[str, Any], notes: dict[str, str]) -> str:
    """Return YAML with a comment above each section. Raises PlanError with the plan's problems."""
    problems = [problem for problem in make_plan(_parse(data)).problems if problem.where != "model.path"]
    if problems:
        raise PlanError.from_problems("\n".join(str(problem) for problem in problems), problems)
    lines = []
    for section, values in data.items():
        lines += [f"# {notes[section]}", *_render_section(section, values)]
    return "\n".join(lines) + "\n"


def _render_section(section: str, values: dict[str, Any]) -> list[str]:
    line = f"{section}: {_render_flow(values)}"
    if len(line) <= _LINE_WIDTH:
        return [line]
    return [f"{section}:", *(f"  {key}: {_render_flow(value)}" for key, value in values.items())]


def _render_flow(value: Any) -> str:  # noqa: ANN401 - any value of a configuration
    """Return a value as YAML on one line; text is quoted where YAML would read it otherwise."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_render_flow(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_render_flow, value)) + "]"
    if isinstance(value, str):
        is_plain = re.fullmatch(r"[A-Za-z/~.][\w./~-]*", value) and value.lower() not in {"true", "false", "null", "~"}
        return value if is_plain else '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return str(value)
