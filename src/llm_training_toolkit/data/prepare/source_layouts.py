"""Choice of the layout of git histories by the special tokens of the model's family."""

from __future__ import annotations

from llm_training_toolkit.config.data_config import DataConfig
from llm_training_toolkit.config.source_config import SourceConfig
from llm_training_toolkit.data.tokenizer import TokenizationSpec
from llm_training_toolkit.families.document_layouts import COMMIT_MARKERS


def resolve_source_layouts(data: DataConfig, markers: TokenizationSpec) -> DataConfig:
    """Replace `auto` of git sources by `commits` if the family has tokens for them, else by `diffs`."""
    layout = "commits" if set(COMMIT_MARKERS) <= set(markers.tokens.all) else "diffs"

    def resolve(source: SourceConfig) -> SourceConfig:
        is_open = source.format == "git" and source.layout == "auto"
        return source.model_copy(update={"layout": layout}) if is_open else source

    held_out = data.eval.model_copy(update={"sources": tuple(map(resolve, data.eval.sources))})
    return data.model_copy(update={"sources": tuple(map(resolve, data.sources)), "eval": held_out})
