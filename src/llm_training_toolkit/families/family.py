"""What a family of models is: its shape, its special tokens and how its parameters are counted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

HfValues = Mapping[str, Any]
"""Values of a Hugging Face configuration by their names there."""

DROPOUTS = (
    "attention_dropout",
    "residual_dropout",
    "embedding_dropout",
    "attn_pdrop",
    "resid_pdrop",
    "embd_pdrop",
)
"""Their names in all families. Always 0, in loaded weights too: dropout draws by the way a batch was split, so that
neither an elastic nor a resumed run could repeat the losses of an undisturbed one."""


@dataclass(frozen=True)
class SpecialTokens:
    """The special tokens of a family, as text. Empty text: the family has no such token."""

    end_of_text: str
    """Closes every document."""
    pad: str
    """Fills a sequence up; carries no loss, so it may be a token that has another use."""
    all: tuple[str, ...]
    """Every special token in the order of its id: a tokenizer of one's own gives them the first ids."""
    fim_prefix: str = ""
    fim_middle: str = ""
    fim_suffix: str = ""
    fim_pad: str = ""
    repository: str = ""
    """Stands before the name of a repository."""
    file: str = ""
    """Stands before a file, or before its name."""

    @property
    def has_fim(self) -> bool:
        """Whether the family knows fill-in-the-middle."""
        return all((self.fim_prefix, self.fim_middle, self.fim_suffix))


@dataclass(frozen=True)
class CodeLayout:
    """How a family writes a repository's name, its files' paths and its stars around their code."""

    stars: str = ""
    """Special token before the stars, of which only the magnitude is written; empty: not written."""
    after_repository: str = ""
    """Text between a repository's name and what follows."""
    between_files: str = ""
    """Text between a file and the next one's token."""
    path_in_prefix: bool = False
    """Fill-in-the-middle has the path behind the sentinel of the prefix, as a part of it."""
    needs_path: bool = False
    """The file's token is followed by a path, always: files cannot be told apart without their paths."""


@dataclass(frozen=True)
class ModelDims:
    """The sizes of one decoder in words that all families share; every count follows from it."""

    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    gated: bool
    """Two matrices into the feed-forward layer (SwiGLU) instead of one."""
    tied: bool
    """One matrix serves as embedding and as output layer."""
    vectors_per_layer: int
    """Parameters of a layer outside its matrices: biases and norms."""
    vectors_outside: int
    """Parameters of the final norm."""
    positions: int = 0
    """Rows of the table of learned positions; 0 = rotary."""
    rms_norms: bool = False
    """The norms are RMSNorms, computed in fp32 whatever the precision, instead of LayerNorms."""
    head_norms: bool = False
    """Queries and keys are normalised head by head."""
    window: int | None = None
    """Tokens a position sees; None = all before it."""
    experts: int = 0
    """Feed-forward layers of width `intermediate` in every layer, of which a router picks some; 0 = one, no router."""
    experts_per_token: int = 0
    """Experts that a token passes through."""

    @property
    def query_width(self) -> int:
        """Width of all query heads; differs from `hidden` where head_dim is explicit."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Width of all key heads, and of all value heads."""
        return self.kv_heads * self.head_dim

    @property
    def attention_matrices(self) -> int:
        """Parameters of a layer in q and o, k and v."""
        return 2 * self.hidden * (self.query_width + self.kv_width)

    @property
    def feed_forward_parameters(self) -> int:
        """Parameters of one feed-forward layer, or of one expert."""
        return (3 if self.gated else 2) * self.hidden * self.intermediate

    @property
    def matrices_per_layer(self) -> int:
        """Parameters in the matrices of a layer: attention, feed-forward or all experts, router."""
        return (
            self.attention_matrices + max(self.experts, 1) * self.feed_forward_parameters + self.experts * self.hidden
        )

    @property
    def linear_matrices(self) -> int:
        """Those of them that are linear layers: transformers 5 has experts and router as bare tensors."""
        return self.attention_matrices if self.experts else self.matrices_per_layer

    @property
    def idle_parameters(self) -> int:
        """Parameters of the experts that a token does not pass through."""
        return self.layers * (self.experts - self.experts_per_token) * self.feed_forward_parameters

    @property
    def total_parameters(self) -> int:
        """All parameters; tied embeddings count once."""
        embeddings = (1 if self.tied else 2) * self.vocab * self.hidden + self.positions * self.hidden
        return embeddings + self.layers * (self.matrices_per_layer + self.vectors_per_layer) + self.vectors_outside

    @property
    def active_parameters(self) -> int:
        """Parameters that a token passes through: all but those of the experts it is not sent to."""
        return self.total_parameters - self.idle_parameters

    @property
    def matmul_parameters(self) -> int:
        """Parameters that multiply a token: matrices and the output layer, not the look-up of embeddings."""
        return self.layers * self.matrices_per_layer + self.vocab * self.hidden - self.idle_parameters

    @property
    def largest_tensor(self) -> int:
        """Numbers in the largest single parameter; transformers 5 fuses all experts of a layer into one."""
        one = self.hidden * self.intermediate
        feed_forward = (2 if self.gated else 1) * self.experts * one if self.experts else one
        return max(self.vocab * self.hidden, self.hidden * self.query_width, feed_forward)

    @property
    def largest_module(self) -> int:
        """Parameters that the forward pass needs at once at the least: a matrix, or a layer's experts and router."""
        return max(self.largest_tensor, self.experts * (self.feed_forward_parameters + self.hidden))


@dataclass(frozen=True)
class Family:
    """Everything that the sizes of a family have in common."""

    name: str
    model_type: str
    """`model_type` of transformers."""
    architecture: str
    """The class that transformers builds."""
    special_tokens: SpecialTokens
    chat_template: str
    """How a conversation is written, in jinja, where the tokenizer does not say it."""
    pre_tokenizer_pattern: str
    """How text is cut before byte pairs are merged: each match of this regular expression is a piece of its own."""
    defaults: HfValues
    """Hugging Face values that all sizes share."""
    read_dims: Callable[[HfValues], ModelDims]
    """Reads a Hugging Face configuration of this family."""
    lora_targets: tuple[str, ...]
    """Names of the linear layers that adapters go to: all of attention and feed-forward, but of a mixture attention
    alone. Its experts are one fused tensor a layer, no linear layers, and its router is called `gate`, which ends the
    name of no target."""
    embedding_name: str = "embed_tokens"
    """Name of the embedding among the model's modules; the output layer is `lm_head` in all families."""
    position_key: str = "max_position_embeddings"
    """Name of the longest position in the configuration."""
    absolute_positions: bool = False
    """Positions are learned, row by row: a longer sequence is impossible, not only untrained."""
    derived_head_dim: bool = False
    """head_dim is hidden size / heads and is not in the configuration."""
    code_layout: CodeLayout = CodeLayout()
    """Where the special tokens for repositories and files stand."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Common names of values that this family calls otherwise."""
    saved_as: Mapping[str, str] = field(default_factory=dict)
    """Other names that transformers gives values when it saves them."""
    fixed: frozenset[str] = frozenset()
    """Values that `model.config_overrides` must not change."""
    published_dropout: float = 0.0
    """Dropout in the configurations that are published with the weights; training sets it to 0."""


@dataclass(frozen=True)
class ModelSize:
    """One published size of a family."""

    name: str
    family: Family
    config: HfValues
    """Hugging Face values of this size alone."""
    other_names: tuple[str, ...] = ()
    """Names of other published weights of exactly this shape."""

    @property
    def hf_values(self) -> dict[str, Any]:
        """The shape of the size: the family's values and its own."""
        return {**self.family.defaults, **self.config}


def build_rope_parameters(theta: float) -> dict[str, Any]:
    """Rotary positions of a given base, as transformers 5 writes them."""
    return {"rope_type": "default", "rope_theta": theta}
