"""Configuration schema of a run: every field with its type, default and meaning.

Defaults are defined here only. The docstring of a field becomes its entry in docs/configuration.md. The tag of a field
says what happens if it changes after the run has started.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PrivateAttr, model_validator

from llm_training_toolkit.config.data_config import DataConfig
from llm_training_toolkit.config.eval_config import EvalConfig
from llm_training_toolkit.config.model_config import ModelConfig, TokenizerConfig
from llm_training_toolkit.config.section import (
    MAX_COUNT,
    ConfigSection,
    Count,
    Duration,
    FieldTag,
    Interval,
    PlainLocation,
    Share,
    Workers,
    check_whole_number,
)


class RunConfig(ConfigSection):
    """Name, directory and random seed of the run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$"), FieldTag.FREE]
    """Name of the run and of its directory. Starting the same name again resumes the run."""
    dir: Annotated[PlainLocation, Field(min_length=1), FieldTag.FREE] = "runs"
    """Directory of all runs. On a cluster a path shared by all nodes, or `s3://bucket/path` (docs/checkpoints.md)."""
    seed: Annotated[int, Field(ge=0), FieldTag.IDENTITY] = 42
    """Random seed for initial weights, data order, fill-in-the-middle and dropout."""
    deterministic: Annotated[bool, FieldTag.FREE] = False
    """Use only deterministic kernels (slower on GPUs). On CPU a run is bit-for-bit reproducible without it."""


class OptimConfig(ConfigSection):
    """Optimizer and learning rate schedule. Norms and biases have no weight decay."""

    name: Annotated[Literal["adamw"], FieldTag.IDENTITY] = "adamw"
    """Optimizer."""
    lr: Annotated[Annotated[float, Field(gt=0.0)] | Literal["auto"], FieldTag.IDENTITY] = "auto"
    """Peak learning rate. `auto` = by training method and model size; `ltt plan` shows the value."""
    betas: Annotated[tuple[float, float], FieldTag.IDENTITY] = (0.9, 0.95)
    """Decay rates of the first and second moment. Qwen and StarCoder use 0.95 for the second."""
    eps: Annotated[float, Field(gt=0.0), FieldTag.IDENTITY] = 1e-8
    """Epsilon, added to the root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0.0), FieldTag.IDENTITY] = 0.1
    """Decoupled weight decay of matrices."""
    lr_scheduler: Annotated[Literal["constant", "linear", "cosine", "wsd"], FieldTag.IDENTITY] = "cosine"
    """Learning rate schedule after warm-up; `wsd` = constant, then a linear decay over the last `decay` of the run."""
    warmup: Annotated[Share | Annotated[int, Field(ge=0)], FieldTag.IDENTITY] = 0.01
    """Length of the warm-up from zero: a share of the run (0.01) or a number of steps (100)."""
    decay: Annotated[Share, FieldTag.IDENTITY] = 0.2
    """Share of the run that the decay of `wsd` takes."""
    min_lr_ratio: Annotated[Share, FieldTag.IDENTITY] = 0.1
    """Final learning rate, as a share of the peak."""
    max_grad_norm: Annotated[float, Field(ge=0.0), FieldTag.IDENTITY] = 1.0
    """Maximum gradient norm for clipping; 0 = no clipping."""

    @model_validator(mode="after")
    def _check_betas(self) -> OptimConfig:
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ValueError(f"betas must lie in [0, 1), not {self.betas}")
        return self


class TrainConfig(ConfigSection):
    """Length of the run, batch sizes and precision."""

    tokens: Annotated[Count | None, FieldTag.HORIZON] = None
    """Length of the run in tokens, padding included (2e9 is fine). Exactly one of tokens, steps and epochs."""
    steps: Annotated[Count | None, FieldTag.HORIZON] = None
    """Length of the run in optimizer steps."""
    epochs: Annotated[Count | None, FieldTag.HORIZON] = None
    """Length of the run in passes over the data."""
    global_batch_size: Annotated[int, Field(ge=1, le=MAX_COUNT), FieldTag.IDENTITY] = 64
    """Sequences per optimizer step, over all workers. Does not depend on the number of workers."""
    micro_batch_size: Annotated[Annotated[int, Field(ge=1, le=MAX_COUNT)] | Literal["auto"], FieldTag.FREE] = "auto"
    """Sequences per forward pass on one worker. Affects memory and speed, not the result. `auto` = as many as fit into
    device memory by the estimate, halved whenever an allocation fails. A resume keeps the value; a new run of the same
    file may get another value and then differs by rounding."""
    precision: Annotated[Literal["auto", "bf16", "fp32"], FieldTag.IDENTITY] = "auto"
    """Precision of the forward and backward pass. Weights are stored and updated in fp32 in either case. `auto` picks
    bf16 on GPUs that support it, and on CPUs if a measurement on every worker finds it no slower than fp32. A resume
    keeps the value."""
    router_balance: Annotated[Annotated[float, Field(gt=0.0, le=1.0)] | None, FieldTag.IDENTITY] = None
    """Mixtures of experts: weight of a loss that loads the experts evenly, such as 0.001. It is taken in each sequence,
    so that the objective does not depend on micro-batches and workers (docs/objective.md). Absent = no such loss."""

    @model_validator(mode="after")
    def _check_run_length(self) -> TrainConfig:
        if sum(length is not None for length in (self.tokens, self.steps, self.epochs)) != 1:
            raise ValueError("give exactly one of train.tokens, train.steps and train.epochs")
        return self


Offload = Literal["none", "optimizer", "optimizer_and_weights"]


class EngineConfig(ConfigSection):
    """DeepSpeed settings."""

    zero_stage: Annotated[Literal["auto", 0, 1, 2, 3], BeforeValidator(check_whole_number), FieldTag.FREE] = "auto"
    """ZeRO stage. Stage 1 shards the optimizer state over the workers, 2 also gradients, 3 also weights. For one worker
    `auto` = the cheapest. For several it is chosen with the micro-batch, by the estimate of memory."""
    offload: Annotated[Offload, FieldTag.FREE] = "none"
    """State kept in host memory instead of on the device: `optimizer` (fp32 weights and Adam's moments, ZeRO 1 or 3) or
    `optimizer_and_weights` (ZeRO 3). A run may change it. Results are those of `none`: bit for bit at ZeRO 1, and at 3
    but for the order in which DeepSpeed adds up the gradient norm."""
    sequence_parallel: Annotated[int, Field(ge=1), FieldTag.FREE] = 1
    """Workers of a replica. They hold slices of the same sequences and exchange them for heads around attention, for
    rows that are too long for one device. It must divide the number of workers, `data.sequence_length` and the model's
    numbers of query heads and of key-value heads. A run may change it. 1 = every worker is a replica."""
    tensor_parallel: Annotated[int, Field(ge=1), FieldTag.FREE] = 1
    """Workers of a replica that hold slices of the matrices of every layer, for weights that are too large for one
    device. It must divide the number of workers, the model's query heads, key-value heads and feed-forward width. ZeRO
    is 0 or 1 then. A run may change it. 1 = every worker holds whole matrices."""
    zero_hpz_partition_size: Annotated[int, Field(ge=1), FieldTag.FREE] = 1
    """Workers that keep a second copy of all weights among them: those of a node (ZeRO 3; hierarchical partitioning of
    ZeRO++). Then only the first gathering of a step passes between nodes. 1 = off. An elastic run has it at
    multiples of it alone."""
    communication_data_type: Annotated[Literal["fp32", "bf16"], FieldTag.FREE] = "fp32"
    """Precision in which gradients pass between workers. `bf16` sends half the bytes and rounds each worker's sum, and
    sums on their way; micro-batches are summed in fp32 either way."""
    deepspeed: Annotated[dict[str, Any], FieldTag.FREE] = {}  # noqa: RUF012 - pydantic copies it
    """Additional DeepSpeed configuration, passed on unchanged. Keys that the toolkit sets are refused."""

    @property
    def ranks_per_replica(self) -> int:
        """Ranks that work on the same sequences."""
        return self.sequence_parallel * self.tensor_parallel


class CheckpointConfig(ConfigSection):
    """Checkpoint interval and retention."""

    interval: Annotated[Interval, FieldTag.FREE] = "10m"
    """Steps (200) or time (10m) between checkpoints. The last step is always saved."""
    keep_latest: Annotated[int, Field(ge=1), FieldTag.FREE] = 3
    """Number of newest checkpoints to keep."""
    keep_every: Annotated[int, Field(ge=0), FieldTag.FREE] = 0
    """Keep every checkpoint whose step is a multiple of this number. 0 = off."""
    keep_best: Annotated[int, Field(ge=0), FieldTag.FREE] = 1
    """Number of checkpoints with the lowest held-out loss to keep, among those of evaluated steps. 0 = off."""


_EVAL_SHARE = 0.02  # of the sequences trained between two evaluations, the default of eval.max_sequences
_MIN_EVAL_TOKENS = 1 << 16


class ExportConfig(ConfigSection):
    """Export at the end of the run."""

    at_end: Annotated[bool, FieldTag.FREE] = True
    """Write a Hugging Face directory to `<run>/export` when the run finishes."""


class ClusterConfig(ConfigSection):
    """Workers, their resources and placement."""

    workers: Annotated[Workers, FieldTag.FREE] = 1
    """Number of Ray Train workers, one device each. An elastic run, such as `[1, 8]`, has 1 to 8 as resources allow:
    fewer after a node is lost, more when one joins. 0 = without Ray: one process, or the ranks of torchrun."""
    resource_timeout: Annotated[Duration, FieldTag.FREE] = "10m"
    """Maximum wait for the resources of the (fewest) workers, at the start and after losing workers, before the run
    fails. At the start, resources that the cluster can never provide are refused at once."""
    gpus_per_worker: Annotated[Literal["auto", 0, 1], BeforeValidator(check_whole_number), FieldTag.FREE] = "auto"
    """GPUs per worker. `auto` = 1 if the cluster has one for every worker, else 0."""
    cpus_per_worker: Annotated[int, Field(ge=1, le=MAX_COUNT), FieldTag.FREE] = 1
    """CPU cores per worker, also its number of threads; another number changes rounding."""
    placement_strategy: Annotated[Literal["pack", "spread", "strict_pack", "strict_spread"], FieldTag.FREE] = "pack"
    """Ray's placement strategy for workers on nodes."""
    env: Annotated[dict[str, str], FieldTag.FREE] = {}  # noqa: RUF012 - pydantic copies it
    """Environment variables of every worker, such as NCCL_SOCKET_IFNAME. No secrets: the run stores them."""

    @property
    def min_workers(self) -> int:
        """Minimum number of workers that the run continues with."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def max_workers(self) -> int:
        """Maximum number of workers that the run uses."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]


class FailuresConfig(ConfigSection):
    """Handling of dead workers, hangs, loss spikes and errors that a restart may avoid."""

    max_failures: Annotated[int, Field(ge=0), FieldTag.FREE] = 3
    """Consecutive failures that are followed by a restart from the newest checkpoint; one more ends the run. A
    checkpoint completed after a failure clears the failures counted before it."""
    max_same_step_failures: Annotated[int, Field(ge=1), FieldTag.FREE] = 2
    """Consecutive failures at one step that end the run: the step is then the likely cause. Lost nodes do not count."""
    on_loss_spike: Annotated[Literal["stop", "skip", "ignore"], FieldTag.FREE] = "stop"
    """Action before the update of a spike. A spike is a loss more than 6 deviations above the median of the last 128
    steps, or a gradient norm as far above and at least 10 times its median (docs/failures.md). With `stop` the run
    saves, names the documents of the step and ends. With `skip` the update is skipped and recorded, with `ignore`
    applied."""
    log_samples: Annotated[bool, FieldTag.FREE] = False
    """Log the sequences that each rank fetches, with a checksum of their tokens: one line per step, in `<run>/samples`.
    Used by `ltt drill` to audit the data."""
    hang_timeout: Annotated[Duration, FieldTag.FREE] = "10m"
    """Time without progress on any rank within a step, after which the run counts as hung and its workers are replaced.
    Three times as long during startup, evaluation and saving; no limit during the export."""


class ProfileConfig(ConfigSection):
    """Recording of some steps by torch's profiler, into `<run>/profile`: see docs/performance.md."""

    steps: Annotated[tuple[Count, Count], FieldTag.FREE]
    """First and last step to record, counted from 1. A few are enough, such as [10, 12]: a trace has every
    operator and kernel of every micro-batch. The first step of a start is not typical, because it compiles and
    allocates."""


class WandbConfig(ConfigSection):
    """Weights & Biases: needs the package `wandb` where rank 0 runs, and WANDB_API_KEY unless it is offline."""

    project: Annotated[str, Field(min_length=1), FieldTag.FREE]
    """Project."""
    entity: Annotated[Annotated[str, Field(min_length=1)] | None, FieldTag.FREE] = None
    """Team or user. Absent = the key's default."""
    mode: Annotated[Literal["online", "offline"], FieldTag.FREE] = "online"
    """`offline` writes into `<run>/wandb`, which `wandb sync` uploads later."""


class MlflowConfig(ConfigSection):
    """MLflow: needs the package `mlflow` or `mlflow-skinny` where rank 0 runs."""

    tracking_uri: Annotated[PlainLocation, Field(min_length=1), FieldTag.FREE]
    """Server (`https://host`) or database (`sqlite:///path/mlflow.db`)."""
    experiment: Annotated[str, Field(min_length=1), FieldTag.FREE]
    """Experiment, created where it does not exist."""


class MonitoringConfig(ConfigSection):
    """Further receivers of the metrics. `metrics.jsonl` and TensorBoard are always written."""

    wandb: WandbConfig | None = None
    """Weights & Biases. Absent = none."""
    mlflow: MlflowConfig | None = None
    """MLflow. Absent = none."""
    prometheus: Annotated[bool, FieldTag.FREE] = False
    """Gauges of the newest step in Ray's exporter of each node, `ray_ltt_<metric>` (docs/monitoring.md)."""
    close_timeout: Annotated[Duration, FieldTag.FREE] = "30s"
    """Longest wait of an attempt's end for each server that has not taken everything."""


class Config(ConfigSection):
    """Configuration of a run."""

    run: RunConfig
    """Name, directory and random seed of the run."""
    model: ModelConfig
    """Model architecture, initial weights and adapters."""
    tokenizer: TokenizerConfig
    """Tokenizer of the run. May be left out where `model.path` is given, which then has it."""
    data: DataConfig
    """Training data and held-out documents."""
    optim: OptimConfig = OptimConfig()
    """Optimizer and learning rate schedule."""
    train: TrainConfig
    """Length of the run, batch sizes and precision."""
    engine: EngineConfig = EngineConfig()
    """DeepSpeed settings."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Checkpoint interval and retention."""
    eval: EvalConfig = EvalConfig()
    """Evaluation of the held-out loss and of tasks."""
    export: ExportConfig = ExportConfig()
    """Export at the end of the run."""
    cluster: ClusterConfig = ClusterConfig()
    """Workers, their resources and placement."""
    failures: FailuresConfig = FailuresConfig()
    """Handling of failures."""
    profile: ProfileConfig | None = None
    """Steps to record with torch's profiler; by default none."""
    monitoring: MonitoringConfig = MonitoringConfig()
    """Further receivers of the metrics."""

    _begun_plan: Mapping[str, Any] = PrivateAttr(default_factory=dict)

    @property
    def begun_plan(self) -> Mapping[str, Any]:
        """Plan that the run began with, if a reader of its directory has added it; in no file and no fingerprint."""
        return self._begun_plan

    def with_begun_plan(self, plan: Mapping[str, Any]) -> Config:
        """Return the configuration with the plan that its run began with."""
        config = self.model_copy()
        config._begun_plan = plan  # noqa: SLF001 - of this class
        return config

    @property
    def max_eval_sequences(self) -> int:
        """Maximum number of held-out sequences per evaluation."""
        if self.eval.max_sequences != "auto":
            return self.eval.max_sequences
        steps = min(self.eval.interval, self.train.steps or self.eval.interval)
        trained = steps * self.train.global_batch_size
        return max(int(_EVAL_SHARE * trained), -(-_MIN_EVAL_TOKENS // self.data.sequence_length))

    @model_validator(mode="after")
    def _check_exporter(self) -> Config:
        if self.monitoring.prometheus and self.cluster.max_workers == 0:
            raise ValueError("monitoring.prometheus: the exporter is Ray's, so it needs cluster.workers of 1 or more")
        return self

    @model_validator(mode="after")
    def _check_no_epochs_with_weights(self) -> Config:
        if self.data.source_weights and self.train.epochs is not None:
            raise ValueError(
                "train.epochs has no meaning where sources have weights, each of which runs through epochs of its own: "
                "give train.tokens or train.steps"
            )
        return self
