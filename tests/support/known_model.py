"""A small exported model that knows one gap and one function by heart, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from llm_training_toolkit import families
from llm_training_toolkit.data.chat.messages import ChatMessage, Conversation
from llm_training_toolkit.data.chat.parse import parse_conversation
from llm_training_toolkit.data.chat.render import ChatRules, encode_prompt, render_chat
from llm_training_toolkit.data.chat.template import ChatTemplate
from llm_training_toolkit.data.code.fim import FimRules, UniformDraw, apply_fim
from llm_training_toolkit.data.code.split_points import TextSegment
from llm_training_toolkit.data.sources import Document
from llm_training_toolkit.data.tokenizer import TextEncoder, TokenizationSpec, open_tokenizer, train_tokenizer
from llm_training_toolkit.evaluation.code_tasks.humaneval import HumanEvalQuestion
from llm_training_toolkit.evaluation.infill import draw_gap
from llm_training_toolkit.models import LossModule, build_model

CONTEXT = 192
FAMILY = families.find_size("qwen3-0.6b").family
KNOWN = '''def area(width, height):
    """The area of a rectangle."""
    if width < 0 or height < 0:
        raise ValueError("negative")
    return width * height
'''
PROBLEM = {
    "task_id": "Small/0",
    "prompt": 'def double(number):\n    """Twice a number.\n    >>> double(2)\n    4\n    """\n',
    "test": "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(-1) == -2\n",
    "entry_point": "double",
}
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "area",
        "parameters": {
            "type": "object",
            "properties": {"width": {"type": "integer"}, "height": {"type": "integer"}},
            "required": ["width", "height"],
        },
    },
}
CALLING: dict[str, Any] = {
    "tools": [TOOL],
    "messages": [
        {"role": "user", "content": "How large is 2 by 3?"},
        {"role": "assistant", "tool_calls": [{"name": "area", "arguments": {"width": 2, "height": 3}}]},
    ],
}
TOOL_TEMPLATE = """\
{% for tool in tools or [] %}{{ tool.function.name }}
{% endfor %}{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}{% for call in message.tool_calls or [] %}<tool_call>{"name": "{{ call.function.name }}", \
"arguments": {{ call.function.arguments | tojson }}}</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
"""Short enough for the model's positions."""
QUESTION = "What is the area?"
ANSWER = "Width times height."
SOLUTION = "    twice = number + number\n    return twice\n"
CHAT_SOLUTION = "Sure:\n\n```python\ndef double(number):\n    return number + number\n```\n\nIt adds."
SHAPE: dict[str, Any] = {
    "model_type": "qwen3",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "tie_word_embeddings": True,
    "max_position_embeddings": CONTEXT,
}


def export_known_model(directory: Path) -> None:
    """Write a directory that plain transformers loads, in fp32."""
    train_tokenizer([KNOWN, PROBLEM["prompt"] + SOLUTION] * 2, 512, TokenizationSpec.from_family(FAMILY), directory)
    (directory / "chat_template.jinja").write_text(FAMILY.chat_template)
    encoder = open_tokenizer(str(directory))
    torch.manual_seed(1)
    model: Any = build_model(SHAPE | {"vocab_size": encoder.vocab_size}, precision="fp32", attention="sdpa")
    question = HumanEvalQuestion(**PROBLEM).build_prompt()
    assert isinstance(question, Conversation)
    conversations = [
        _conversation(encoder, directory, Conversation((ChatMessage("user", QUESTION),)), ANSWER),
        _conversation(encoder, directory, question, CHAT_SOLUTION),
    ]
    _memorise(model, [_gap(encoder), _solution(encoder), *conversations, _call(encoder)])
    ends = [encoder.get_special_token_id(token) for token in ("<|im_end|>", "<|endoftext|>")]
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=ends[1])
    model.save_pretrained(directory)


def _gap(encoder: TextEncoder) -> list[int]:
    """The known document as training rearranges it, cut where the task cuts it."""
    document = Document(0, "area.py", KNOWN)
    gap = draw_gap(document, "line", seed=0)
    assert gap is not None
    tokens = FAMILY.special_tokens
    prefix, middle, suffix = map(
        encoder.get_special_token_id, (tokens.fim_prefix, tokens.fim_middle, tokens.fim_suffix)
    )
    places = len(KNOWN) + 1
    cuts = [(len(gap.prefix) + 0.5) / places, (len(gap.prefix) + len(gap.middle) + 0.5) / places]
    rules = FimRules(prefix, middle, suffix, rate=1.0, spm_rate=0.0, middle_only=False)
    items = apply_fim("", KNOWN, UniformDraw(0.0, 1.0, *cuts), rules)
    pieces = [encoder.encode(item.text) if isinstance(item, TextSegment) else [item] for item in items]
    return [token for piece in pieces for token in piece] + [encoder.get_special_token_id(tokens.end_of_text)]


def _solution(encoder: TextEncoder) -> list[int]:
    """The function as a document; another follows it, as in a file."""
    return encoder.encode(PROBLEM["prompt"]) + encoder.encode(SOLUTION + "\ndef other():\n")


def _conversation(encoder: TextEncoder, directory: Path, question: Conversation, answer: str) -> list[int]:
    """A question with its answer, as the family's template writes them, and a text after it."""
    template = ChatTemplate.from_tokenizer(directory, "")
    asked = encode_prompt(question, template, encoder)
    assert template.end_of_turn is not None
    return [
        *asked,
        *encoder.encode(answer),
        encoder.get_special_token_id(template.end_of_turn),
        *encoder.encode("\nand more"),
    ]


def _call(encoder: TextEncoder) -> list[int]:
    """A question that calls a tool, as `TOOL_TEMPLATE` writes it."""
    template = ChatTemplate(TOOL_TEMPLATE, FAMILY.special_tokens.all, {})
    document = Document(0, "calls", parse_conversation(CALLING).to_text())
    end = encoder.get_special_token_id(FAMILY.special_tokens.end_of_text)
    (rendered,) = render_chat([(0, document)], ChatRules(CONTEXT, end), encoder, template)
    tokens: list[int] = rendered.examples[0].tokens.tolist()
    return tokens


def _memorise(model: Any, texts: Sequence[list[int]]) -> None:
    """Train until each text is the likeliest continuation of its beginning."""
    module = LossModule(model.train(), 1024)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    ids = torch.tensor([token for text in texts for token in text])
    # One row, whose positions restart: the texts do not see each other.
    positions = torch.cat([torch.arange(len(text)) for text in texts])
    labels = torch.where(positions.roll(-1) == 0, -100, ids.roll(-1))
    for _ in range(300):
        optimizer.zero_grad()
        loss: torch.Tensor = module(ids[None], positions[None], labels[None]) / len(ids)
        if float(loss.detach()) < 0.02:
            break
        torch.autograd.backward(loss)
        optimizer.step()
    else:
        raise AssertionError(f"not learnt by heart: loss {float(loss)}")
    model.eval()
