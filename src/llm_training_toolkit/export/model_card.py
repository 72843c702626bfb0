"""Model card of an export, generated from its run."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from llm_training_toolkit.checkpoint import Manifest
from llm_training_toolkit.config import Config
from llm_training_toolkit.data.prepare.dataset_info import DatasetInfo
from llm_training_toolkit.plan import make_plan
from llm_training_toolkit.runs.directory import RunDirectory
from llm_training_toolkit.runs.json_lines import read_newest_rows

ExportKind = Literal["model", "adapters", "merged"]  # fully trained, adapters, or adapters merged into their base


def format_model_card(
    run: RunDirectory, config: Config, dataset_info: DatasetInfo, manifest: Manifest, *, kind: ExportKind, base: str
) -> str:
    """Return the README.md of an exported directory, in Markdown."""
    library = "peft" if kind == "adapters" else "transformers"
    head = [f"library_name: {library}", "pipeline_tag: text-generation"]
    head += [f"base_model: {base}"] if kind == "adapters" else []
    rows = "\n".join(f"| {name} | {value} |" for name, value in _collect_facts(run, config, manifest).items())
    sources = "\n".join(
        f"- `{_hide_home(source.path)}`: {source.documents:,} documents, {source.tokens:,} tokens"
        for source in dataset_info.sources
    )
    parts = [
        "---\n" + "\n".join(head) + "\n---",
        f"# {config.run.name}",
        _format_description(config, kind, base),
        f"| | |\n|---|---|\n{rows}",
        f"Trained on:\n\n{sources}",
        f"```python\n{_format_loading_code(config, kind, base)}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _hide_home(path: str) -> str:
    """Return a path below the home directory with `~` for it: cards are published."""
    return f"~/{Path(path).relative_to(Path.home())}" if Path(path).is_relative_to(Path.home()) else path


def _format_description(config: Config, kind: ExportKind, base: str) -> str:
    start = config.model.path or config.model.init_from
    first = f"which began as `{start}`" if start else "from random weights"
    said = {
        "model": f"A {config.model.name} model, {first}, trained with the LLM Training Toolkit.",
        "adapters": f"Adapters (LoRA) for `{base}`, trained with the LLM Training Toolkit.",
        "merged": f"`{base}` with adapters (LoRA) merged into it, trained with the LLM Training Toolkit.",
    }
    return f"{said[kind]} The licence of the weights it began with holds for it, too." if start else said[kind]


def _collect_facts(run: RunDirectory, config: Config, manifest: Manifest) -> dict[str, str]:
    plan = make_plan(config)
    facts = {
        "step": f"{manifest.step:,}",
        "tokens seen": f"{manifest.tokens:,}, padding included",
        "sequences": f"of {config.data.sequence_length:,} tokens, {config.train.global_batch_size} a step",
        "learning rate": f"{plan.lr:.3g}, {config.optim.lr_scheduler}, {config.optim.name}",
        "precision": config.train.precision,
        "seed": str(config.run.seed),
    }
    if plan.adapter is not None:
        places = ", ".join((*plan.adapter.target_names, *plan.adapter.modules_to_save))
        facts["adapters"] = f"rank {plan.adapter.rank}, alpha {plan.adapter.alpha}, on {places}"
    losses = [
        float(row["eval/loss"])
        for row in read_newest_rows(run.metrics_path)
        if row.get("step") == manifest.step and "eval/loss" in row
    ]
    if losses:
        facts["held-out loss"] = f"{losses[-1]:.4f}"
    facts["versions"] = ", ".join(f"{name} {number}" for name, number in manifest.versions.items())
    return facts


def _format_loading_code(config: Config, kind: ExportKind, base: str) -> str:
    if kind != "adapters":
        return (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            'model = AutoModelForCausalLM.from_pretrained("PATH OF THIS DIRECTORY")\n'
            'tokenizer = AutoTokenizer.from_pretrained("PATH OF THIS DIRECTORY")'
        )
    dtype = {"bf16": "bfloat16", "fp32": "float32"}[config.train.precision]
    return (
        "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'base = AutoModelForCausalLM.from_pretrained("{base}", dtype="{dtype}")\n'
        'model = PeftModel.from_pretrained(base, "PATH OF THIS DIRECTORY", autocast_adapter_dtype=False)\n'
        'tokenizer = AutoTokenizer.from_pretrained("PATH OF THIS DIRECTORY")'
    )
