"""Configuration of a run: schema, strict loading, and run identity."""

from llm_training_toolkit.config.data_config import DataConfig, EvalSplitConfig
from llm_training_toolkit.config.eval_config import EvalConfig, EvalTaskConfig
from llm_training_toolkit.config.load import (
    dump_config_json,
    load_config,
    parse_config,
    parse_config_json,
    redact_config,
    redact_data,
)
from llm_training_toolkit.config.model_config import ModelConfig, TokenizerConfig, TrainTokenizerConfig
from llm_training_toolkit.config.run_identity import (
    ConfigChange,
    check_config_changes,
    diff_configs,
    fingerprint,
    flatten_config,
)
from llm_training_toolkit.config.schema import (
    CheckpointConfig,
    ClusterConfig,
    Config,
    EngineConfig,
    ExportConfig,
    FailuresConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
)
from llm_training_toolkit.config.section import ConfigSection, FieldTag, parse_duration_seconds
from llm_training_toolkit.config.source_config import FimConfig, SourceConfig

__all__ = [
    "CheckpointConfig",
    "ClusterConfig",
    "Config",
    "ConfigChange",
    "ConfigSection",
    "DataConfig",
    "EngineConfig",
    "EvalConfig",
    "EvalSplitConfig",
    "EvalTaskConfig",
    "ExportConfig",
    "FailuresConfig",
    "FieldTag",
    "FimConfig",
    "ModelConfig",
    "OptimConfig",
    "RunConfig",
    "SourceConfig",
    "TokenizerConfig",
    "TrainConfig",
    "TrainTokenizerConfig",
    "check_config_changes",
    "diff_configs",
    "dump_config_json",
    "fingerprint",
    "flatten_config",
    "load_config",
    "parse_config",
    "parse_config_json",
    "parse_duration_seconds",
    "redact_config",
    "redact_data",
]
