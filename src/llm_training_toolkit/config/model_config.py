"""Configuration of model and tokenizer."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from llm_training_toolkit.config.section import ConfigSection, FieldTag, PlainLocation, Revision


def _check_checkpointing(value: object) -> object:
    """Refuse the values of earlier versions."""
    if isinstance(value, bool):
        raise ValueError(f"write {'full' if value else 'none'} for what was {str(value).lower()}, or auto")
    return value


class LoraConfig(ConfigSection):
    """LoRA: train two low-rank matrices beside each linear layer; the model's own weights are frozen."""

    rank: Annotated[int, Field(ge=1), FieldTag.IDENTITY] = 16
    """Rank: inner dimension of an adapter's two matrices."""
    alpha: Annotated[int, Field(ge=1), FieldTag.IDENTITY] = 32
    """Numerator of the scaling alpha / rank of an adapter's output."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0), FieldTag.IDENTITY] = 0.0
    """Dropout on the input of an adapter. Masks depend only on seed, step and sequence."""
    target_modules: Annotated[Literal["auto"] | Annotated[tuple[str, ...], Field(min_length=1)], FieldTag.IDENTITY] = (
        "auto"
    )
    """Linear layers with adapters, by name. `auto` = attention and feed-forward (MoE models: attention only)."""
    target_parameters: Annotated[tuple[Literal["gate_up_proj", "down_proj"], ...], FieldTag.IDENTITY] = ()
    """MoE models: the tensors of a layer's experts with adapters, one adapter an expert. Absent = none. Each pass of a
    layer adds the adapters to a copy of all its experts, as peft does: docs/adapters.md has what this takes."""
    use_rslora: Annotated[bool, FieldTag.IDENTITY] = False
    """Scale by alpha / √rank instead (rsLoRA, Kalajdzievski 2023), so that higher ranks learn as fast."""
    use_dora: Annotated[bool, FieldTag.IDENTITY] = False
    """Train the magnitude of each weight row separately from its direction (DoRA, Liu et al. 2024). Slower."""
    modules_to_save: Annotated[tuple[str, ...], FieldTag.IDENTITY] = ()
    """Modules to train in full besides the adapters: the embedding or the output layer, by name."""
    quantize: Annotated[Literal["nf4"] | None, FieldTag.IDENTITY] = None
    """Quantize the frozen linear layers to 4 bits (QLoRA, Dettmers et al. 2023). GPU only."""


class ModelConfig(ConfigSection):
    """Model architecture, initial weights and adapters."""

    name: Annotated[str, FieldTag.IDENTITY]
    """Size of a known family, such as `qwen3-0.6b`, in any case, with or without its organization. May be left out
    beside `path`: the size follows from the name or the config.json of the weights, in a directory or at the hub. For
    an unknown name `ltt plan` lists the nearest ones."""
    path: Annotated[PlainLocation | None, FieldTag.IDENTITY] = None
    """Pretrained weights: a directory or a hub id. Without `path` and `init_from` the weights are random."""
    revision: Annotated[Revision | None, FieldTag.IDENTITY] = None
    """Branch, tag or commit of a hub id in `path`. Absent = its `main` branch. The commit found by the first attempt is
    recorded, and a resume uses it."""
    init_from: Annotated[PlainLocation | None, FieldTag.IDENTITY] = None
    """Directory of another run. Starts from the weights of its newest checkpoint at step 0, with a new optimizer."""
    config_overrides: Annotated[dict[str, int | float | bool], FieldTag.IDENTITY] = {}  # noqa: RUF012 - pydantic copies it
    """Changes to the size's architecture, by the names of its Hugging Face configuration. From scratch only."""
    resize_vocab_to: Annotated[Annotated[int, Field(gt=0, multiple_of=64)] | None, FieldTag.IDENTITY] = None
    """Number of embedding rows, if the tokenizer has more entries than the weights of `path`: a multiple of 64, such as
    49216. New rows start as the mean of the old ones. Absent = as in the weights; rows are never removed."""
    attn_implementation: Annotated[
        Literal["auto", "varlen", "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"],
        FieldTag.FREE,
    ] = "auto"
    """Implementation of attention. Packed documents attend to themselves alone with each of them. `varlen` and the
    flash packages compute document by document, without a mask; the flash packages and flex_attention need a GPU.
    `auto` = varlen on GPUs in bf16, else sdpa."""
    activation_checkpointing: Annotated[
        Literal["auto", "none", "selective", "full"], BeforeValidator(_check_checkpointing), FieldTag.FREE
    ] = "auto"
    """Activations recomputed in the backward pass, which leaves the result as it is. `full` keeps the input of each
    layer alone: about a third more time for much less memory. `selective` also keeps the outputs of attention and of
    every second matrix product. `auto` = the least recomputation that fits into device memory by the estimate. A resume
    keeps the value."""
    compile: Annotated[Literal["auto"] | bool, FieldTag.FREE] = "auto"
    """Compile each decoder layer by torch.compile, in training. The result differs by rounding, as between kernels.
    Excluded: ZeRO 3, linear attention, DoRA, 4-bit weights, flash packages and flex_attention. `auto` = on GPUs, in
    runs of about an hour and more. A resume keeps it where layers can be compiled."""
    loss_chunk_size: Annotated[Annotated[int, Field(ge=0)] | Literal["auto"], FieldTag.IDENTITY] = "auto"
    """Tokens per chunk of the cross-entropy loss, so that the full logits are never materialized. `auto` = chunks of 67
    million logits (0.4 GB in bf16): 441 tokens for Qwen's vocabulary. 0 = no chunks."""
    lora: LoraConfig | None = None
    """Train adapters instead of the model. Absent = train the model itself."""

    @model_validator(mode="after")
    def _check_weights_origin(self) -> ModelConfig:
        if self.path is not None and self.init_from is not None:
            raise ValueError("path and init_from both name weights to start from: keep one")
        if self.revision is not None and self.path is None:
            raise ValueError("revision belongs to a hub id in path: give path, or remove revision")
        if self.config_overrides and (self.path is not None or self.init_from is not None):
            raise ValueError("config_overrides changes a model from scratch: saved weights bring their own; remove it")
        if self.resize_vocab_to is not None and self.path is None:
            raise ValueError(
                "resize_vocab_to is for weights of model.path; from scratch set config_overrides.vocab_size"
            )
        if self.resize_vocab_to is not None and self.lora is not None:
            raise ValueError(
                "resize_vocab_to adds rows to weights that adapters leave as they are: keep one of the two"
            )
        return self


class TrainTokenizerConfig(ConfigSection):
    """Byte-level BPE tokenizer trained for the run, with the special tokens of the model's family."""

    vocab_size: Annotated[int, Field(ge=512, le=1_000_000), FieldTag.IDENTITY]
    """Number of vocabulary entries, including special tokens."""


class TokenizerConfig(ConfigSection):
    """Tokenizer of the run: exactly one of the two fields."""

    path: Annotated[PlainLocation | None, FieldTag.IDENTITY] = None
    """Directory with a tokenizer.json, or a hub id."""
    revision: Annotated[Revision | None, FieldTag.IDENTITY] = None
    """Branch, tag or commit of a hub id in `path`. Absent = its `main` branch, or `model.revision` if the tokenizer is
    left out."""
    train: TrainTokenizerConfig | None = None
    """Train a tokenizer on the run's own documents."""

    @model_validator(mode="after")
    def _check_tokenizer_origin(self) -> TokenizerConfig:
        if (self.path is None) == (self.train is None):
            raise ValueError("give exactly one of tokenizer.path and tokenizer.train")
        if self.revision is not None and self.path is None:
            raise ValueError("revision belongs to a hub id in path: give path, or remove revision")
        return self
