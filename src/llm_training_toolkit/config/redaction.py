"""Configuration without the secrets of addresses, as it is stored, compared and published. Pure."""

from __future__ import annotations

from llm_training_toolkit.config.data_config import DataConfig
from llm_training_toolkit.config.schema import Config
from llm_training_toolkit.config.source_config import SourceConfig
from llm_training_toolkit.config.uri import redact_uri


def redact_config(config: Config) -> Config:
    """Return a configuration in which the addresses of documents are redacted. Others cannot have a query."""
    tasks = tuple(
        task.model_copy(update={"data": redact_uri(task.data)}) if task.data else task for task in config.eval.tasks
    )
    evaluation = config.eval.model_copy(update={"tasks": tasks})
    return config.model_copy(update={"data": redact_data(config.data), "eval": evaluation})


def redact_data(data: DataConfig) -> DataConfig:
    """Return sources with addresses without a query: a signed address is new each day, its documents stay the same."""
    held_out = data.eval.model_copy(update={"sources": _redact_sources(data.eval.sources)})
    return data.model_copy(update={"sources": _redact_sources(data.sources), "eval": held_out})


def _redact_sources(sources: tuple[SourceConfig, ...]) -> tuple[SourceConfig, ...]:
    return tuple(source.model_copy(update={"path": redact_uri(source.path)}) for source in sources)
