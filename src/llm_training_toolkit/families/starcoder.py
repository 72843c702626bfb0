"""StarCoder families: StarCoder2, StarCoder 1 (GPTBigCode) and its predecessor SantaCoder."""

from __future__ import annotations

from dataclasses import replace

from llm_training_toolkit.families import chat
from llm_training_toolkit.families.document_layouts import COMMIT_MARKERS, ISSUE_MARKERS
from llm_training_toolkit.families.family import (
    CodeLayout,
    Family,
    HfValues,
    ModelDims,
    ModelSize,
    SpecialTokens,
    build_rope_parameters,
)

# GPT-2's expression with single digits, which StarCoder's tokenizer splits off first.
PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

_FIM = ("<|endoftext|>", "<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>")
_JUPYTER = ("<jupyter_start>", "<jupyter_text>", "<jupyter_code>", "<jupyter_output>")


def _build_special_tokens(repository: str, file: str, every: tuple[str, ...]) -> SpecialTokens:
    # <|endoftext|> has id 0 in both generations, is begin and end, and also pads: there is no padding token.
    return SpecialTokens(
        end_of_text="<|endoftext|>",
        pad="<|endoftext|>",
        fim_prefix="<fim_prefix>",
        fim_middle="<fim_middle>",
        fim_suffix="<fim_suffix>",
        repository=repository,
        file=file,
        all=every,
    )


TOKENS_1 = _build_special_tokens(
    "<reponame>",
    "<filename>",
    (
        *_FIM,
        "<filename>",
        "<gh_stars>",
        *ISSUE_MARKERS,
        *_JUPYTER,
        "<empty_output>",
        *COMMIT_MARKERS,
        "<reponame>",
    ),
)
# Table 5 of the StarCoder2 paper, without pull request tokens: they are never written here, and would waste entries of
# a vocabulary trained from scratch.
TOKENS_2 = _build_special_tokens(
    "<repo_name>",
    "<file_sep>",
    (
        *_FIM,
        "<repo_name>",
        "<file_sep>",
        *ISSUE_MARKERS,
        *_JUPYTER,
        "<jupyter_script>",
        "<empty_output>",
        "<code_to_intermediate>",
        "<intermediate_to_code>",
    ),
)


TOKENS_SANTA = SpecialTokens(
    end_of_text="<|endoftext|>",
    pad="<|endoftext|>",
    fim_prefix="<fim-prefix>",
    fim_middle="<fim-middle>",
    fim_suffix="<fim-suffix>",
    all=("<|endoftext|>", "<fim-prefix>", "<fim-middle>", "<fim-suffix>", "<fim-pad>"),
)


def read_starcoder2_dims(hf: HfValues) -> ModelDims:
    """Read dimensions of StarCoder2: biases (`use_bias`), two LayerNorms per layer, head_dim = hidden / heads."""
    hidden, inter = hf["hidden_size"], hf["intermediate_size"]
    head_dim = hidden // hf["num_attention_heads"]
    heads = hf["num_attention_heads"] + 2 * hf["num_key_value_heads"]
    biases = heads * head_dim + hidden + inter + hidden if hf["use_bias"] else 0
    return ModelDims(
        vocab=hf["vocab_size"],
        hidden=hidden,
        layers=hf["num_hidden_layers"],
        heads=hf["num_attention_heads"],
        kv_heads=hf["num_key_value_heads"],
        head_dim=head_dim,
        intermediate=inter,
        gated=False,
        tied=hf["tie_word_embeddings"],
        vectors_per_layer=biases + 4 * hidden,
        vectors_outside=2 * hidden,
        window=hf["sliding_window"],
    )


def read_starcoder_dims(hf: HfValues) -> ModelDims:
    """Read dimensions of StarCoder 1: one key-value head (`multi_query`), biases everywhere, learned positions."""
    hidden = hf["n_embd"]
    inter = hf["n_inner"] or 4 * hidden  # transformers saves None for four times the width
    head_dim = hidden // hf["n_head"]
    kv_heads = 1 if hf["multi_query"] else hf["n_head"]
    biases = (hf["n_head"] + 2 * kv_heads) * head_dim + hidden + inter + hidden
    return ModelDims(
        vocab=hf["vocab_size"],
        hidden=hidden,
        layers=hf["n_layer"],
        heads=hf["n_head"],
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=inter,
        gated=False,
        tied=hf["tie_word_embeddings"],
        vectors_per_layer=biases + 4 * hidden,
        vectors_outside=2 * hidden,
        positions=hf["n_positions"],
    )


STARCODER2 = Family(
    name="starcoder2",
    model_type="starcoder2",
    architecture="Starcoder2ForCausalLM",
    special_tokens=TOKENS_2,
    chat_template=chat.STARCODER,
    pre_tokenizer_pattern=PATTERN,
    defaults={
        "hidden_act": "gelu_pytorch_tanh",
        "initializer_range": 0.018042,
        "norm_epsilon": 1e-5,
        "sliding_window": 4096,
        "use_bias": True,
        "attention_dropout": 0.0,
        "residual_dropout": 0.0,
        "embedding_dropout": 0.0,
        "max_position_embeddings": 16384,
    },
    read_dims=read_starcoder2_dims,
    lora_targets=("q_proj", "k_proj", "v_proj", "o_proj", "c_fc", "c_proj"),
    derived_head_dim=True,
    code_layout=CodeLayout(path_in_prefix=True),
    tied_by_default=True,
    published_dropout=0.1,
)
STARCODER = Family(
    name="starcoder",
    model_type="gpt_bigcode",
    architecture="GPTBigCodeForCausalLM",
    special_tokens=TOKENS_1,
    chat_template=chat.STARCODER,
    pre_tokenizer_pattern=PATTERN,
    defaults={
        "activation_function": "gelu_pytorch_tanh",
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-5,
        "multi_query": True,
        "scale_attn_weights": True,
        "attention_softmax_in_fp32": True,
        "scale_attention_softmax_in_fp32": True,
        "attn_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "n_positions": 8192,
        "tie_word_embeddings": True,
    },
    read_dims=read_starcoder_dims,
    lora_targets=("c_attn", "c_proj", "c_fc"),
    embedding_name="wte",
    position_key="n_positions",
    absolute_positions=True,
    flex_attention=False,
    derived_head_dim=True,
    code_layout=CodeLayout(stars="<gh_stars>", needs_path=True),
    tied_by_default=True,
    aliases={
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
        "intermediate_size": "n_inner",
    },
    published_dropout=0.1,
)
SANTACODER = replace(
    STARCODER,
    name="santacoder",
    special_tokens=TOKENS_SANTA,
    defaults={**STARCODER.defaults, "n_positions": 2048},
    code_layout=CodeLayout(),
)


def _build_starcoder2_shape(
    layers: int, hidden: int, heads: int, kv_heads: int, theta: float, *, tied: bool
) -> HfValues:
    return {
        "vocab_size": 49152,
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "rope_parameters": build_rope_parameters(theta),
        "tie_word_embeddings": tied,
    }


def _build_starcoder1_shape(layers: int, hidden: int, heads: int) -> HfValues:
    return {"vocab_size": 49152, "n_layer": layers, "n_embd": hidden, "n_head": heads, "n_inner": 4 * hidden}


SIZES = (
    ModelSize("starcoder2-3b", STARCODER2, _build_starcoder2_shape(30, 3072, 24, 2, 999999.4420358813, tied=True)),
    ModelSize("starcoder2-7b", STARCODER2, _build_starcoder2_shape(32, 4608, 36, 4, 1_000_000.0, tied=True)),
    ModelSize(
        "starcoder2-15b",
        STARCODER2,
        _build_starcoder2_shape(40, 6144, 48, 4, 100_000.0, tied=False),
        other_names=("starcoder2-15b-instruct-v0.1",),
    ),
    ModelSize("starcoderbase-1b", STARCODER, _build_starcoder1_shape(24, 2048, 16)),
    ModelSize("starcoderbase-3b", STARCODER, _build_starcoder1_shape(36, 2816, 22)),
    ModelSize("starcoderbase-7b", STARCODER, _build_starcoder1_shape(42, 4096, 32)),
    ModelSize(
        "starcoder",
        STARCODER,
        _build_starcoder1_shape(40, 6144, 48),
        other_names=("starcoder-15.5b", "starcoderbase", "starcoderplus"),
    ),
    ModelSize("tiny_starcoder_py", STARCODER, _build_starcoder1_shape(20, 768, 12)),
    ModelSize("gpt_bigcode-santacoder", SANTACODER, {**_build_starcoder1_shape(24, 2048, 16), "vocab_size": 49280}),
)
