"""Definition of a model family: dimensions, special tokens and parameter counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

HfValues = Mapping[str, Any]  # values of a Hugging Face configuration, by name

# Dropout keys of all families. Always 0, also for loaded weights: dropout would depend on how a batch is split, so
# elastic and resumed runs could not reproduce the losses of an undisturbed one.
DROPOUTS = (
    "attention_dropout",
    "residual_dropout",
    "embedding_dropout",
    "attn_pdrop",
    "resid_pdrop",
    "embd_pdrop",
)


# Classes of transformers whose packed documents keep apart, by tests/unit/models/test_document_isolation.py.
ISOLATED_MODEL_TYPES = frozenset(
    {
        "gpt_bigcode",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_5_moe_text",
        "qwen3_5_text",
        "qwen3_moe",
        "qwen3_next",
        "starcoder2",
    }
)


@dataclass(frozen=True)
class SpecialTokens:
    """Special tokens of a family, as text. Empty = the family has no such token."""

    end_of_text: str
    """Token at the end of every document."""
    pad: str
    """Padding token; carries no loss, so it may have another use."""
    all: tuple[str, ...]
    """All special tokens in id order; a tokenizer trained for a run gives them the first ids."""
    fim_prefix: str = ""
    fim_middle: str = ""
    fim_suffix: str = ""
    repository: str = ""
    """Token before the name of a repository."""
    file: str = ""
    """Token before a file or its name."""

    @property
    def has_fim(self) -> bool:
        """True if the family supports fill-in-the-middle."""
        return all((self.fim_prefix, self.fim_middle, self.fim_suffix))


@dataclass(frozen=True)
class CodeLayout:
    """Format of repository name, file paths and stars around code."""

    stars: str = ""
    """Special token before the stars, which are written as their magnitude; empty = not written."""
    after_repository: str = ""
    """Text after the name of a repository."""
    between_files: str = ""
    """Text between a file and the next file's token."""
    path_in_prefix: bool = False
    """Fill-in-the-middle puts the path after the prefix token, as part of the prefix."""
    needs_path: bool = False
    """A path always follows the file token: without paths, files are indistinguishable."""


@dataclass(frozen=True)
class LinearAttentionDims:
    """Dimensions of the Gated DeltaNet layers of a hybrid model (Yang et al. 2024)."""

    layers: int
    """Decoder layers that have it instead of attention."""
    key_heads: int
    value_heads: int
    key_head_dim: int
    value_head_dim: int
    kernel: int
    """Tokens that the convolution sees."""
    gate_apart: bool = False
    """Queries, keys and values are one matrix and the output gate another (Qwen3.5), instead of all in one."""

    @property
    def key_width(self) -> int:
        """Width of all query heads, and of all key heads."""
        return self.key_heads * self.key_head_dim

    @property
    def value_width(self) -> int:
        """Width of all value heads, and of the output gate."""
        return self.value_heads * self.value_head_dim

    @property
    def input_width(self) -> int:
        """Width of queries, keys, values and output gate together."""
        return 2 * (self.key_width + self.value_width)

    @property
    def convolved_width(self) -> int:
        """Width of queries, keys and values, which the convolution mixes."""
        return 2 * self.key_width + self.value_width

    @property
    def widest_input(self) -> int:
        """Width of the largest input projection."""
        return self.convolved_width if self.gate_apart else self.input_width

    def count_matrices(self, hidden: int) -> int:
        """Parameters in the matrices of one layer: two input projections and the output projection."""
        return hidden * (self.input_width + 2 * self.value_heads + self.value_width)

    @property
    def vectors(self) -> int:
        """Other parameters of one layer: the convolution, decay and time step of each head, the norm."""
        return self.convolved_width * self.kernel + 2 * self.value_heads + self.value_head_dim


@dataclass(frozen=True)
class ModelDims:
    """Dimensions of a decoder in terms common to all families; all counts derive from them."""

    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    gated: bool
    """Two input matrices in the feed-forward layer (SwiGLU) instead of one."""
    tied: bool
    """One matrix for embedding and output layer."""
    vectors_per_layer: int
    """Parameters of a layer outside its matrices: biases and norms."""
    vectors_outside: int
    """Parameters of the final norm, and of what only some layers have outside their matrices."""
    positions: int = 0
    """Rows of the learned position table; 0 = rotary."""
    rms_norms: bool = False
    """RMSNorms, computed in fp32 at any precision, instead of LayerNorms."""
    head_norms: bool = False
    """Norms of queries and keys, head by head."""
    window: int | None = None
    """Sliding window in tokens; without one (None) a position attends to all before it."""
    experts: int = 0
    """Experts per layer, of width `intermediate`; a router picks some. 0 = one feed-forward layer, no router."""
    experts_per_token: int = 0
    """Experts that the router picks for a token."""
    shared_expert: int = 0
    """Width of an expert that every token passes, behind a gate of its own; 0 = none."""
    output_gate: bool = False
    """The query projection also makes a gate for the output of the heads."""
    linear_attention: LinearAttentionDims | None = None
    """Layers of linear attention in a hybrid model; its other layers have attention."""

    @property
    def centered_norms(self) -> bool:
        """RMSNorms with weights around 0 that multiply in fp32, as in all hybrid models."""
        return self.linear_attention is not None

    @property
    def query_width(self) -> int:
        """Width of all query heads; differs from `hidden` if head_dim is explicit."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Width of all key heads, and of all value heads."""
        return self.kv_heads * self.head_dim

    def slice_matrices(self, parts: int) -> ModelDims:
        """Return the dimensions of one of several ranks that hold slices of the matrices (engine.tensor_parallel).

        Biases are cut too, but counted whole: they are a few in ten thousand.
        """
        heads, kv_heads = max(self.heads // parts, 1), max(self.kv_heads // parts, 1)
        return replace(self, heads=heads, kv_heads=kv_heads, intermediate=max(self.intermediate // parts, 1))

    @property
    def attention_layers(self) -> int:
        """Layers with attention between all tokens: all but those of linear attention."""
        return self.layers - (self.linear_attention.layers if self.linear_attention else 0)

    @property
    def attention_matrices(self) -> int:
        """Parameters of a layer in q and o, k and v, and the output gate."""
        gate = self.hidden * self.query_width if self.output_gate else 0
        return 2 * self.hidden * (self.query_width + self.kv_width) + gate

    @property
    def feed_forward_parameters(self) -> int:
        """Parameters of one feed-forward layer, or of one expert."""
        return (3 if self.gated else 2) * self.hidden * self.intermediate

    @property
    def feed_forward_matrices(self) -> int:
        """Parameters in the matrices after attention: feed-forward, or all experts, router and shared expert."""
        shared = 3 * self.hidden * self.shared_expert + self.hidden if self.shared_expert else 0
        return max(self.experts, 1) * self.feed_forward_parameters + self.experts * self.hidden + shared

    @property
    def all_matrices(self) -> int:
        """Parameters in the matrices of all layers."""
        linear = self.linear_attention
        mixing = linear.layers * linear.count_matrices(self.hidden) if linear else 0
        return self.layers * self.feed_forward_matrices + self.attention_layers * self.attention_matrices + mixing

    @property
    def linear_matrices(self) -> int:
        """Part of `all_matrices` in linear layers: transformers 5 has experts and router as bare tensors."""
        bare = self.experts * (self.feed_forward_parameters + self.hidden)
        return self.all_matrices - self.layers * bare

    @property
    def idle_parameters(self) -> int:
        """Parameters of the experts that a token does not use."""
        return self.layers * (self.experts - self.experts_per_token) * self.feed_forward_parameters

    @property
    def total_parameters(self) -> int:
        """All parameters; tied embeddings count once."""
        embeddings = (1 if self.tied else 2) * self.vocab * self.hidden + self.positions * self.hidden
        return embeddings + self.all_matrices + self.layers * self.vectors_per_layer + self.vectors_outside

    @property
    def active_parameters(self) -> int:
        """Parameters that a token uses: all but idle experts."""
        return self.total_parameters - self.idle_parameters

    @property
    def matmul_parameters(self) -> int:
        """Parameters that multiply a token: matrices and output layer, without the embedding lookup."""
        return self.all_matrices + self.vocab * self.hidden - self.idle_parameters

    @property
    def largest_tensor(self) -> int:
        """Elements of the largest single parameter; transformers 5 fuses all experts of a layer into one."""
        one = self.hidden * self.intermediate
        feed_forward = (2 if self.gated else 1) * self.experts * one if self.experts else one
        queries = self.hidden * self.query_width * (2 if self.output_gate else 1)
        inputs = self.hidden * self.linear_attention.widest_input if self.linear_attention else 0
        return max(self.vocab * self.hidden, queries, inputs, feed_forward)

    @property
    def largest_module(self) -> int:
        """Minimum of parameters that the forward pass needs at once: a matrix, or a layer's experts and router."""
        return max(self.largest_tensor, self.experts * (self.feed_forward_parameters + self.hidden))


@dataclass(frozen=True)
class Family:
    """Everything that the sizes of a family have in common."""

    name: str
    model_type: str
    """Value of `model_type` in transformers."""
    architecture: str
    """Model class of transformers."""
    special_tokens: SpecialTokens
    chat_template: str
    """Chat template in Jinja, for tokenizers without one."""
    pre_tokenizer_pattern: str
    """Regular expression of the pre-tokenizer: each match is a separate piece, split off before BPE merges."""
    defaults: HfValues
    """Hugging Face values common to all sizes."""
    read_dims: Callable[[HfValues], ModelDims]
    """Reader of a Hugging Face configuration of this family."""
    lora_targets: tuple[str, ...]
    """Names of the linear layers that get adapters: attention and feed-forward; in a mixture of experts attention only.
    Its experts are fused tensors of a layer (`model.lora.target_parameters`). Its router is named `gate`, a suffix of
    no target. A shared expert has no adapters: peft 0.21 takes the names of its layers for those of the fused experts.
    """
    embedding_name: str = "embed_tokens"
    """Module name of the embedding; the output layer is `lm_head` in all families."""
    position_key: str = "max_position_embeddings"
    """Configuration key of the maximum position."""
    absolute_positions: bool = False
    """Positions are learned row by row: a longer sequence is impossible, not only untrained."""
    flex_attention: bool = True
    """True if the model class of transformers supports flex_attention."""
    derived_head_dim: bool = False
    """True if head_dim is hidden size / heads and not in the configuration."""
    code_layout: CodeLayout = CodeLayout()
    """Placement of the special tokens for repositories and files."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Common names of values that this family names differently."""
    saved_as: Mapping[str, str] = field(default_factory=dict)
    """Names under which transformers saves values, if different."""
    fixed: frozenset[str] = frozenset()
    """Values that `model.config_overrides` must not change."""
    tied_by_default: bool = False
    """Value of `tie_word_embeddings` in transformers' class, which a config.json may leave out."""
    published_dropout: float = 0.0
    """Dropout in the published configurations; training sets it to 0."""


@dataclass(frozen=True)
class ModelSize:
    """Published size of a family."""

    name: str
    family: Family
    config: HfValues
    """Hugging Face values of this size only."""
    other_names: tuple[str, ...] = ()
    """Names of other published weights of exactly this shape."""

    @property
    def hf_values(self) -> dict[str, Any]:
        """Hugging Face values of the size: its family's and its own."""
        return {**self.family.defaults, **self.config}


def build_rope_parameters(theta: float) -> dict[str, Any]:
    """Return rotary position parameters with base `theta`, as transformers 5 writes them."""
    return {"rope_type": "default", "rope_theta": theta}
