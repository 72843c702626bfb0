"""The configuration of a run: every field, its type, its default, what it means.

The only place where a default stands. The text under a field becomes its entry in
docs/configuration.md; its tag says what happens when it changes in a run that has begun.
"""

from __future__ import annotations

import enum
import math
import re
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)


class FieldTag(enum.Enum):
    """What a changed field means for a run that has already begun."""

    IDENTITY = "identity"
    """Another value is another run: refused unless accepted by name (`--accept`)."""
    HORIZON = "horizon"
    """How long the run goes: changed with `--extend`."""
    FREE = "free"
    """May change at every start."""


def _convert_integral_float(value: object) -> object:
    """Let `2e9` stand for 2000000000; leave everything else for pydantic to judge."""
    return int(value) if isinstance(value, float) and math.isfinite(value) and value.is_integer() else value


_MAX_COUNT = 10**15
"""Largest length, batch or number of threads that is read: more than any cluster does, and safe in 64 bits."""
Count = Annotated[int, BeforeValidator(_convert_integral_float), Field(ge=1, le=_MAX_COUNT)]


def _check_whole_number(value: object) -> object:
    """Refuse true and 1.0 where a Literal of integers would let them pass for 1."""
    if isinstance(value, bool | float):
        raise ValueError("write a whole number")
    return value


Share = Annotated[float, Field(ge=0.0, le=1.0)]
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(s|m|h)")
_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def parse_duration_seconds(text: str) -> float | None:
    """Seconds of a duration such as `90s`, `10m` or `1.5h`; None where the text is none."""
    match = _DURATION.fullmatch(text)
    return float(match[1]) * _SECONDS[match[2]] if match else None


def _check_interval(value: object) -> object:
    if isinstance(value, str) and not parse_duration_seconds(value):
        raise ValueError("write a number of steps (200) or a duration above zero (90s, 10m, 1.5h)")
    return value


Interval = Annotated[Annotated[int, Field(ge=1)] | str, BeforeValidator(_check_interval)]


def _check_duration(value: object) -> object:
    if not isinstance(value, str) or not parse_duration_seconds(value):
        raise ValueError("write a duration above zero (90s, 10m, 1.5h)")
    return value


Duration = Annotated[str, BeforeValidator(_check_duration)]


def _check_worker_range(value: object) -> object:
    """One number, or the fewest and the most; true and 1.0 are neither."""
    ends = tuple(value) if isinstance(value, list | tuple) else (value,)
    numbers = [end for end in ends if isinstance(end, int) and not isinstance(end, bool)]
    pair = isinstance(value, list | tuple)
    right = len(numbers) == len(ends) == 1 + pair and min(numbers) >= pair and numbers == sorted(numbers)
    if not right:
        raise ValueError("write a number of workers (4), or the fewest (at least 1) and the most of them ([1, 8])")
    return ends if pair else value


Workers = Annotated[int | tuple[int, int], BeforeValidator(_check_worker_range)]


class ConfigSection(BaseModel):
    """A part of the configuration: strict, frozen, every unknown key an error."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class RunConfig(ConfigSection):
    """Where the run lives and what its chance is drawn from."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$"), FieldTag.FREE]
    """Name of the run and of its directory. The same name again resumes it."""
    dir: Annotated[str, Field(min_length=1), FieldTag.FREE] = "runs"
    """Directory that holds the runs. On a cluster: a path that every node sees, or `s3://bucket/path`
    (docs/checkpoints.md)."""
    seed: Annotated[int, Field(ge=0), FieldTag.IDENTITY] = 42
    """Source of all randomness: initial weights, data order, fill-in-the-middle, dropout."""
    deterministic: Annotated[bool, FieldTag.FREE] = False
    """Use only deterministic kernels (slower on GPUs). On CPU a run repeats bit for bit without it."""


class LoraConfig(ConfigSection):
    """Low-rank adapters: the model stays as it is, two small matrices beside each linear layer are trained (LoRA)."""

    rank: Annotated[int, Field(ge=1), FieldTag.IDENTITY] = 16
    """Inner width of an adapter's two matrices."""
    alpha: Annotated[int, Field(ge=1), FieldTag.IDENTITY] = 32
    """What an adapter adds is multiplied by alpha / rank."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0), FieldTag.IDENTITY] = 0.0
    """Share of an adapter's inputs that is left out in training, drawn from seed, step and sequence."""
    target_modules: Annotated[Literal["auto"] | Annotated[tuple[str, ...], Field(min_length=1)], FieldTag.IDENTITY] = (
        "auto"
    )
    """Names of the linear layers that get adapters; `auto` = all of the family's, attention and feed-forward."""
    use_rslora: Annotated[bool, FieldTag.IDENTITY] = False
    """Multiply by alpha / root of rank instead (Kalajdzievski 2023), so that higher ranks learn as fast."""
    use_dora: Annotated[bool, FieldTag.IDENTITY] = False
    """Train the length of each row of the weights apart from its direction (DoRA, Liu et al. 2024). Slower."""
    modules_to_save: Annotated[tuple[str, ...], FieldTag.IDENTITY] = ()
    """Modules trained whole beside the adapters: the embedding or the output layer, by name."""
    quantize: Annotated[Literal["nf4"] | None, FieldTag.IDENTITY] = None
    """Keep the model's matrices in 4 bits while the adapters are trained (QLoRA, Dettmers et al. 2023). GPU only."""


class ModelConfig(ConfigSection):
    """What is trained."""

    name: Annotated[str, FieldTag.IDENTITY]
    """A size of a known family, such as `qwen3-0.6b` (`ltt plan` names the nearest ones when it is unknown)."""
    path: Annotated[str | None, FieldTag.IDENTITY] = None
    """Weights to start from: a directory or a hub id. Without it the weights are random."""
    init_from: Annotated[str | None, FieldTag.IDENTITY] = None
    """Start from the newest checkpoint of another run, given by its directory. Not a resume: step 0, new optimizer."""
    config_overrides: Annotated[dict[str, int | float | bool], FieldTag.IDENTITY] = {}
    """Changes to the size's shape, by the names of its Hugging Face configuration. From scratch only."""
    resize_vocab_to: Annotated[Annotated[int, Field(gt=0, multiple_of=64)] | None, FieldTag.IDENTITY] = None
    """Rows of the embedding, for a tokenizer with more entries than the weights of `path` have rows: a multiple of 64,
    such as 49216. New rows begin at the mean of the old. Absent = as the weights have them; none is ever removed."""
    attn_implementation: Annotated[Literal["eager", "sdpa", "flash_attention_2", "flex_attention"], FieldTag.FREE] = (
        "sdpa"
    )
    """How attention is computed; the last two need a GPU. Documents in a sequence do not see each other."""
    activation_checkpointing: Annotated[bool, FieldTag.FREE] = False
    """Recompute activations in the backward pass: about a third more time for much less memory."""
    loss_chunk_size: Annotated[Annotated[int, Field(ge=0)] | Literal["auto"], FieldTag.IDENTITY] = "auto"
    """Tokens per chunk of the loss over the vocabulary, so that whole logits never exist. `auto` = as many as make 67
    million logits (0.4 GB in bf16): 441 for Qwen's vocabulary. 0 = no chunks."""
    lora: LoraConfig | None = None
    """Train adapters instead of the model; absent = the model itself."""

    @model_validator(mode="after")
    def _check_weights_origin(self) -> ModelConfig:
        if self.path is not None and self.init_from is not None:
            raise ValueError("path and init_from both name weights to start from: keep one")
        if self.config_overrides and (self.path is not None or self.init_from is not None):
            raise ValueError("shape changes a model from scratch: saved weights bring their own; remove shape")
        if self.resize_vocab_to is not None and self.path is None:
            raise ValueError("grow_vocabulary is for weights of model.path; from scratch set shape.vocab_size")
        if self.resize_vocab_to is not None and self.lora is not None:
            raise ValueError(
                "grow_vocabulary adds rows to weights that adapters leave as they are: keep one of the two"
            )
        return self


class TrainTokenizerConfig(ConfigSection):
    """A byte-level BPE tokenizer of one's own, with the special tokens of the model's family."""

    vocab_size: Annotated[int, Field(ge=512, le=1_000_000), FieldTag.IDENTITY]
    """Entries of the vocabulary, special tokens included."""


class TokenizerConfig(ConfigSection):
    """Where the tokenizer comes from: exactly one of the two."""

    path: Annotated[str | None, FieldTag.IDENTITY] = None
    """A directory with a tokenizer.json, or a hub id."""
    train: TrainTokenizerConfig | None = None
    """Train one from the run's own documents."""

    @model_validator(mode="after")
    def _check_tokenizer_origin(self) -> TokenizerConfig:
        if (self.path is None) == (self.train is None):
            raise ValueError("give exactly one of tokenizer.path and tokenizer.train")
        return self


class FimConfig(ConfigSection):
    """Fill-in-the-middle: a document is cut twice and the middle is moved to its end."""

    rate: Annotated[Share, FieldTag.IDENTITY] = 0.5
    """Share of documents, or of the files of a repository, that are rearranged; StarCoder was trained with 0.5."""
    spm_rate: Annotated[Share, FieldTag.IDENTITY] = 0.5
    """Share of those in suffix-prefix-middle order; the others are prefix-suffix-middle."""
    loss: Annotated[Literal["all", "middle"], FieldTag.IDENTITY] = "all"
    """Train on every token, or on the middle and its end alone."""
    level: Annotated[Literal["context", "document"], FieldTag.IDENTITY] = "context"
    """Rearrange each chunk of a document that is too long for a sequence, or a whole document, or file of a repository,
    before it is cut."""


class SourceConfig(ConfigSection):
    """One source of documents."""

    path: Annotated[str, Field(min_length=1), FieldTag.IDENTITY]
    """A file, a directory, a glob, an address (`s3://`, `gs://`, `hf://`), or `python:stdlib` (the standard library of
    the running Python). Files may be compressed (.gz, .bz2, .xz, .zst)."""
    format: Annotated[Literal["code", "text", "chat"], FieldTag.IDENTITY]
    """`code`: a document a file, or a record with `content`. `text`: a document a file, or a record with `text`.
    `chat`: a conversation a record. Records are lines of .jsonl files, or rows of .parquet and .arrow files."""
    fim: FimConfig | None = None
    """Fill-in-the-middle for this source; absent = plain. Not for chat."""
    group_by: Annotated[Literal["file", "repository"], FieldTag.IDENTITY] = "file"
    """Code: a document is a file, or all files of a repository in the order of their paths."""
    metadata: Annotated[bool, FieldTag.IDENTITY] = False
    """Code: put the repository's name, the file's path and the stars before a document, in the family's own tokens."""
    loss: Annotated[Literal["assistant", "last_turn", "all"], FieldTag.IDENTITY] = "assistant"
    """Chat: train on what the assistant says and the end of its turn, on its last turn alone, or on everything."""
    overlong: Annotated[Literal["auto", "split", "drop", "error"], FieldTag.IDENTITY] = "auto"
    """A document longer than a sequence: cut into chunks, drop it (counted), or stop. `auto` = drop for chat, continue
    for the others."""
    weight: Annotated[Annotated[float, Field(gt=0.0)] | None, FieldTag.IDENTITY] = None
    """Its share of the tokens, relative to the weights of the other sources: all of them have one, or none. Without
    weights every source is seen once per epoch."""

    @model_validator(mode="after")
    def _check_no_credentials(self) -> SourceConfig:
        if re.match(r"[A-Za-z0-9+.-]+://[^/@]*:[^/@]*@", self.path):
            raise ValueError(
                "path holds a key, which receipts and logs would repeat: give keys by environment variables "
                "(docs/data.md, Addresses)"
            )
        return self

    @model_validator(mode="after")
    def _check_format_options(self) -> SourceConfig:
        for_code = [
            name for name in ("group_by", "metadata") if getattr(self, name) != type(self).model_fields[name].default
        ]
        if for_code and self.format != "code":
            raise ValueError(f"{' and '.join(for_code)}: only for format code, not for {self.format}; remove")
        if self.fim is not None and self.format == "chat":
            raise ValueError("fim is for formats code and text: a conversation has no middle to fill in; remove it")
        if "loss" in self.model_fields_set and self.format != "chat":
            raise ValueError(
                f"loss is for format chat: format {self.format} trains on every token (fim.loss is for "
                "fill-in-the-middle); remove it"
            )
        return self

    @model_serializer(mode="wrap")
    def _serialize_applicable_fields(self, whole: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without `loss` where it says nothing, so that what was written can be read again."""
        values: dict[str, Any] = whole(self)
        return values if self.format == "chat" else {name: value for name, value in values.items() if name != "loss"}


class EvalSplitConfig(ConfigSection):
    """What is held out: a share of the documents, or documents of one's own."""

    fraction: Annotated[float, Field(ge=0.0, lt=1.0), FieldTag.IDENTITY] = 0.01
    """Share of the documents kept out of training, chosen by a hash. With `sources` it must not be given, and is 0."""
    split_by: Annotated[Literal["document", "repository"], FieldTag.IDENTITY] = "document"
    """What the fraction is taken of: documents, by the hash of their content, or repositories, by the hash of their
    name, so that no file of a held-out repository is trained on."""
    sources: tuple[SourceConfig, ...] = ()
    """Documents to hold out instead: never trained on, and whatever of `data.sources` has the same content is dropped
    and counted as `in_eval`."""

    @model_validator(mode="after")
    def _check_split_choice(self) -> EvalSplitConfig:
        if self.sources and "fraction" not in self.model_fields_set:
            object.__setattr__(self, "fraction", 0.0)  # frozen, and no validator before this one sees strict values
        if self.sources and (self.fraction > 0.0 or self.split_by != "document"):
            given = "fraction" if self.fraction > 0.0 else "split_by"
            raise ValueError(f"{given} chooses among the training documents, sources names others: keep one of the two")
        if any(source.fim is not None for source in self.sources):
            raise ValueError("sources: held-out documents are not rearranged; remove fim")
        if any(source.weight is not None for source in self.sources):
            raise ValueError("sources: every held-out document is evaluated once; remove weight")
        return self


class DataConfig(ConfigSection):
    """What is trained on."""

    sequence_length: Annotated[int, Field(ge=16, le=10**9), FieldTag.IDENTITY]
    """Tokens in a packed sequence."""
    sources: Annotated[tuple[SourceConfig, ...], Field(min_length=1)]
    """Where the documents come from; each once per epoch, or by its weight."""
    eval: EvalSplitConfig = EvalSplitConfig()
    """The held-out part."""
    on_error: Annotated[Literal["stop", "skip"], FieldTag.IDENTITY] = "stop"
    """A document that cannot be read: stop and name it, or skip and count it."""
    max_skipped: Annotated[Share, FieldTag.IDENTITY] = 0.001
    """With on_error: skip, the largest share of documents that may be skipped."""
    cache: Annotated[str, Field(min_length=1), FieldTag.FREE] = "auto"
    """Directory for prepared tokens, shared by runs. `auto` = `.cache` beside the runs; where those lie in an object
    store, `~/.cache/llm-training-toolkit`."""

    @property
    def source_weights(self) -> tuple[float, ...]:
        """The sources' weights; empty where they have none."""
        return tuple(source.weight for source in self.sources if source.weight is not None)

    @model_validator(mode="after")
    def _check_source_weights(self) -> DataConfig:
        without = [source.path for source in self.sources if source.weight is None]
        if self.source_weights and without:
            raise ValueError(f"sources: a weight for every one or for none; {', '.join(without)} has none")
        return self


class OptimConfig(ConfigSection):
    """The optimizer and its learning rate. Norms and biases carry no weight decay."""

    name: Annotated[Literal["adamw"], FieldTag.IDENTITY] = "adamw"
    """The optimizer."""
    lr: Annotated[Annotated[float, Field(gt=0.0)] | Literal["auto"], FieldTag.IDENTITY] = "auto"
    """Peak learning rate; `auto` chooses by method and size, and the plan shows it."""
    betas: Annotated[tuple[float, float], FieldTag.IDENTITY] = (0.9, 0.95)
    """Decay of the first and second moment; 0.95 is what Qwen and StarCoder use."""
    eps: Annotated[float, Field(gt=0.0), FieldTag.IDENTITY] = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0.0), FieldTag.IDENTITY] = 0.1
    """Decoupled weight decay of matrices."""
    lr_scheduler: Annotated[Literal["constant", "linear", "cosine", "wsd"], FieldTag.IDENTITY] = "cosine"
    """Shape after warm-up; `wsd` = stable, then a linear decay over the last `decay` of the run."""
    warmup: Annotated[Share | Annotated[int, Field(ge=0)], FieldTag.IDENTITY] = 0.01
    """Warm-up from zero: a share of the run (0.01) or a number of steps (100)."""
    decay: Annotated[Share, FieldTag.IDENTITY] = 0.2
    """Share of the run that `wsd` decays over."""
    min_lr_ratio: Annotated[Share, FieldTag.IDENTITY] = 0.1
    """Where the schedule ends, as a share of the peak."""
    max_grad_norm: Annotated[float, Field(ge=0.0), FieldTag.IDENTITY] = 1.0
    """Largest norm of the gradient; 0 = no clipping."""

    @model_validator(mode="after")
    def _check_betas(self) -> OptimConfig:
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ValueError(f"betas must lie in [0, 1), not {self.betas}")
        return self


class TrainConfig(ConfigSection):
    """How long and in what portions."""

    tokens: Annotated[Count | None, FieldTag.HORIZON] = None
    """Length of the run in tokens, padding included (2e9 is fine). Exactly one of tokens, steps, epochs."""
    steps: Annotated[Count | None, FieldTag.HORIZON] = None
    """Length of the run in optimizer steps."""
    epochs: Annotated[Count | None, FieldTag.HORIZON] = None
    """Length of the run in passes over the data."""
    global_batch_size: Annotated[int, Field(ge=1, le=_MAX_COUNT), FieldTag.IDENTITY] = 64
    """Sequences per optimizer step, over all workers. Never changes, whatever the number of workers."""
    micro_batch_size: Annotated[Annotated[int, Field(ge=1, le=_MAX_COUNT)] | Literal["auto"], FieldTag.FREE] = "auto"
    """Sequences per forward pass on one worker. Changes memory and speed, not the result. `auto` = as many as the
    memory estimate leaves room for on the device, and half of them whenever an allocation fails. A resume keeps it;
    another start of the same file may take another, and then rounds differently."""
    precision: Annotated[Literal["auto", "bf16", "fp32"], FieldTag.IDENTITY] = "auto"
    """Precision of the forward and backward pass. Weights are kept and updated in fp32 either way. `auto` = bf16 on
    GPUs that have it; on CPUs bf16 where a measurement on every worker finds it no slower than fp32. A resume keeps
    it."""

    @model_validator(mode="after")
    def _check_run_length(self) -> TrainConfig:
        if sum(length is not None for length in (self.tokens, self.steps, self.epochs)) != 1:
            raise ValueError("give exactly one of train.tokens, train.steps and train.epochs")
        return self


class EngineConfig(ConfigSection):
    """How DeepSpeed spreads the work."""

    zero_stage: Annotated[Literal["auto", 0, 1, 2, 3], BeforeValidator(_check_whole_number), FieldTag.FREE] = "auto"
    """ZeRO stage: what is spread over the workers. 1 optimizer state, 2 and gradients, 3 and weights. `auto` = for one
    worker the stage that costs least, for several the lowest that the memory estimate fits into their devices."""
    deepspeed: Annotated[dict[str, Any], FieldTag.FREE] = {}
    """Passed to DeepSpeed as it stands, except the keys the toolkit owns, which are refused."""


class CheckpointConfig(ConfigSection):
    """When the run is saved and what is kept."""

    interval: Annotated[Interval, FieldTag.FREE] = "10m"
    """Steps (200) or time (10m) between checkpoints. The last step is always saved."""
    keep_latest: Annotated[int, Field(ge=1), FieldTag.FREE] = 3
    """How many of the newest checkpoints are kept."""
    keep_every: Annotated[int, Field(ge=0), FieldTag.FREE] = 0
    """Keep each checkpoint whose step is a multiple of this for good. 0 = none."""
    keep_best: Annotated[int, Field(ge=0), FieldTag.FREE] = 1
    """How many with the lowest held-out loss are kept, of those whose own step was evaluated. 0 = none."""


class EvalTaskConfig(ConfigSection):
    """A task the model is measured by. What is absent has the default of `ltt evaluate`."""

    task: Annotated[Literal["perplexity", "infill", "humaneval"], FieldTag.FREE]
    """Loss of documents, gaps in code, or functions and their tests (docs/evaluation.md)."""
    interval: Annotated[Annotated[int, Field(ge=1)] | None, FieldTag.FREE] = None
    """Also while the run trains, on a checkpoint every so many steps; all workers wait. Absent: at the end alone."""
    data: Annotated[str | None, FieldTag.FREE] = None
    """Documents, or a file of problems. Absent: what the run holds out; for humaneval the 164 of the package."""
    format: Annotated[Literal["code", "text", "chat"] | None, FieldTag.FREE] = None
    """Of the documents."""
    limit: Annotated[Annotated[int, Field(ge=1)] | None, FieldTag.FREE] = None
    """infill, humaneval: so many documents or problems."""
    samples: Annotated[Annotated[int, Field(ge=1)] | None, FieldTag.FREE] = None
    """humaneval: completions of each problem, for pass@10 and pass@100."""
    temperature: Annotated[Annotated[float, Field(ge=0.0)] | None, FieldTag.FREE] = None
    """humaneval: 0 = always the likeliest token."""

    @model_validator(mode="after")
    def _check_task_options(self) -> EvalTaskConfig:
        own = {
            "perplexity": {"format"},
            "infill": {"format", "limit"},
            "humaneval": {"limit", "samples", "temperature"},
        }
        strange = [name for name in self.get_task_options() if name not in own[self.task] | {"data"}]
        if strange:
            raise ValueError(f"{' and '.join(strange)}: not for task {self.task}; remove")
        if self.samples is not None and self.samples > 1 and not self.temperature:
            raise ValueError("samples are all the same without a temperature: 0.2 and 0.8 are usual")
        return self

    def get_task_options(self) -> dict[str, Any]:
        """What was given beside the name, as `ltt evaluate` takes it."""
        return self.model_dump(exclude={"task", "interval"}, exclude_none=True)


class EvalConfig(ConfigSection):
    """When the held-out loss is measured, and what else the model is measured by."""

    interval: Annotated[int, Field(ge=1), FieldTag.FREE] = 200
    """Steps between evaluations; step 0 and the last step are always evaluated."""
    tasks: tuple[EvalTaskConfig, ...] = ()
    """Tasks carried out on the exported model when the run finishes, and on the way. One that fails is reported."""


class ExportConfig(ConfigSection):
    """What is left when the run finishes."""

    at_end: Annotated[bool, FieldTag.FREE] = True
    """Write a Hugging Face directory to `<run>/export` when the run finishes."""


class ClusterConfig(ConfigSection):
    """What the run takes of the machines."""

    workers: Annotated[Workers, FieldTag.FREE] = 1
    """Ray Train workers, one device each. `[1, 8]` = elastic: as many as there is room for, from 1 to 8; the run
    shrinks when a node is lost and grows when one comes. 0 = without Ray: this process, or torchrun's ranks."""
    resource_timeout: Annotated[Duration, FieldTag.FREE] = "10m"
    """How long a run waits for room for its (fewest) workers, at its start and after it has lost some, before it fails.
    What can never come is not waited for at the start."""
    gpus_per_worker: Annotated[Literal["auto", 0, 1], BeforeValidator(_check_whole_number), FieldTag.FREE] = "auto"
    """GPUs of a worker. `auto` = one where the cluster has one for every worker, otherwise none."""
    cpus_per_worker: Annotated[int, Field(ge=1, le=_MAX_COUNT), FieldTag.FREE] = 1
    """CPU cores of a worker, and its number of threads: another number gives other rounding."""
    placement_strategy: Annotated[Literal["pack", "spread", "strict_pack", "strict_spread"], FieldTag.FREE] = "pack"
    """How workers are placed on nodes."""
    env: Annotated[dict[str, str], FieldTag.FREE] = {}
    """Environment variables of every worker, for example NCCL_SOCKET_IFNAME; no secrets, as it is written down."""

    @property
    def min_workers(self) -> int:
        """The smallest number of workers the run goes on with."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def max_workers(self) -> int:
        """The largest number of workers the run takes."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]


class FailuresConfig(ConfigSection):
    """What happens when a worker dies, hangs, or raises an error that a restart may not meet again."""

    max_failures: Annotated[int, Field(ge=0), FieldTag.FREE] = 3
    """How many failures in a row are answered by new workers that go on from the newest checkpoint. A checkpoint
    completed after a failure wipes out what was counted before it."""
    max_same_step_failures: Annotated[int, Field(ge=1), FieldTag.FREE] = 2
    """How often the same step may fail in a row before the run ends: the cause is then in the step. A lost node does
    not count."""
    on_loss_spike: Annotated[Literal["stop", "skip", "ignore"], FieldTag.FREE] = "stop"
    """What happens before an update whose loss lies 6 deviations above the median of the last 128 steps, or whose
    gradient is ten times as large as usual and stands out as much (docs/failures.md). `stop`: the run saves and ends,
    with the documents of the step named. `skip`: the update is left out and written down. `ignore`: it is taken."""
    log_samples: Annotated[bool, FieldTag.FREE] = False
    """Every rank writes down which sequences it fetched, with a checksum of their tokens: a line a step, in
    `<run>/ledger`. `ltt drill` counts with it."""
    hang_timeout: Annotated[Duration, FieldTag.FREE] = "10m"
    """How long no rank may advance within a step before the run counts as hung and gets new workers. Three times as
    long while it starts, evaluates or saves; no limit on the export."""


class Config(ConfigSection):
    """A run, whole."""

    run: RunConfig
    """Where the run lives and what its chance is drawn from."""
    model: ModelConfig
    """What is trained."""
    tokenizer: TokenizerConfig
    """The tokenizer."""
    data: DataConfig
    """What is trained on."""
    optim: OptimConfig = OptimConfig()
    """The optimizer and its learning rate."""
    train: TrainConfig
    """How long and in what portions."""
    engine: EngineConfig = EngineConfig()
    """How DeepSpeed spreads the work."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When the run is saved and what is kept."""
    eval: EvalConfig = EvalConfig()
    """When the held-out loss is measured."""
    export: ExportConfig = ExportConfig()
    """What is left when the run finishes."""
    cluster: ClusterConfig = ClusterConfig()
    """What the run takes of the machines."""
    failures: FailuresConfig = FailuresConfig()
    """What happens when a worker dies."""

    @model_validator(mode="after")
    def _check_no_epochs_with_weights(self) -> Config:
        if self.data.source_weights and self.train.epochs is not None:
            raise ValueError(
                "train.epochs has no meaning where sources have weights, each of which runs through epochs of its own: "
                "give train.tokens or train.steps"
            )
        return self
