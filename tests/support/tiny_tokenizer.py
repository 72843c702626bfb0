"""A small tokenizer of StarCoder's kind, and a text to train it on."""

from __future__ import annotations

from llm_training_toolkit.data.tokenizer import TokenizationSpec
from llm_training_toolkit.families import CodeLayout, SpecialTokens

# StarCoder's ids: the end of text is 0, which no code may take for "none".
MARKERS = TokenizationSpec(
    SpecialTokens(
        end_of_text="<|endoftext|>",
        pad="<fim_pad>",
        all=("<|endoftext|>", "<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>"),
        fim_prefix="<fim_prefix>",
        fim_middle="<fim_middle>",
        fim_suffix="<fim_suffix>",
    ),
    CodeLayout(),
    pre_tokenizer_pattern=r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    chat_template="",
)
CODE = "def add(first, second):\n    return first + second\n\n\nclass Größe:\n    name = '漢字 😀'\n"
