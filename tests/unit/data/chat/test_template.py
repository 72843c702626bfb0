"""Chat templates of all kinds: where the assistant speaks is found out, and what cannot be followed is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_training_toolkit.data.chat.parse import parse_conversation
from llm_training_toolkit.data.chat.template import ChatTemplate
from llm_training_toolkit.errors import DataError
from llm_training_toolkit.families import FAMILIES
from tiny_chat import AGENT, RECORD, TAGS, WEATHER, ChatMaker

MARKERS = st.sampled_from(
    ["<|im_end|>", "<|im_start|>assistant\n", "</think>", "<think>", "<tool_call>", "<|endoftext|>"]
)
HOSTILE = st.lists(MARKERS | st.text(alphabet="ab漢\n<|>", max_size=8), max_size=4).map(
    lambda texts: "a" + "".join(texts)
)


# Templates in the manner of other models: what they do around an answer is found out, not known beforehand.
OTHERS: dict[str, tuple[str, str]] = {
    "the last turn is left open (Qwen1.5)": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
        "{% if add_generation_prompt or not loop.last %}{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        "<|im_start|>user\n6*7?<|im_end|>\n<|im_start|>assistant\n[[42<|im_end|>]]\n"
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n[[Because.<|im_end|>]]",
    ),
    "the prompt begins to think (QwQ)": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}",
        "<|im_start|>user\n6*7?<|im_end|>\n<|im_start|>assistant\n[[42<|im_end|>]]\n"
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n[[Because.<|im_end|>]]",
    ),
    "markers from pieces, and an end after the end (Phi)": (
        "{% for m in messages %}{{ '<|im_' + 'start|>' + m.role + m.content + '<|im_end|>' }}{% endfor %}"
        "{{ '<|im_start|>assistant' if add_generation_prompt else '<|endoftext|>' }}",
        "<|im_start|>user6*7?<|im_end|><|im_start|>assistant[[42<|im_end|>]]"
        "<|im_start|>userWhy?<|im_end|><|im_start|>assistant[[Because.<|im_end|>]]",
    ),
    "no end of turn, and another turn begun (OctoCoder)": (
        "{% for m in messages %}{{ ('Question: ' if m.role == 'user' else 'Answer: ') + m.content + '\n\n' }}"
        "{% endfor %}{{ 'Question: ' }}",
        "Question: 6*7?\n\nAnswer: [[42]]\n\nQuestion: Why?\n\nAnswer: [[Because.<|endoftext|>]]",
    ),
    "the header is the user's (Llama 2)": (
        "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content.strip() + ' [/INST]\n' }}"
        "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}",
        "[INST] 6*7? [/INST]\n[[42<|endoftext|>]][INST] Why? [/INST]\n[[Because.<|endoftext|>]]",
    ),
    "a first loop gathers, a macro writes": (
        "{% macro turn(m) %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endmacro %}"
        "{% for m in messages %}{% set role = m.role %}{% endfor %}{% for m in messages %}{{ turn(m) }}{% endfor %}"
        "{{ '<|im_start|>assistant\n' if add_generation_prompt }}",
        "<|im_start|>user\n6*7?<|im_end|>\n<|im_start|>assistant\n[[42<|im_end|>]]\n"
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n[[Because.<|im_end|>]]",
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_templates_of_other_kinds(make_chat: ChatMaker, kind: str) -> None:
    source, expected = OTHERS[kind]
    chat = make_chat("qwen3", source)
    assert chat.marked(RECORD) == expected
    theirs = chat.theirs.apply_chat_template(RECORD["messages"], tokenize=False)
    assert theirs.startswith(chat.template.render_conversation(parse_conversation(RECORD)).text)


@pytest.mark.parametrize("kind", OTHERS)
@given(text=HOSTILE)
def test_marker_text_stays_text_in_templates_of_other_kinds(make_chat: ChatMaker, kind: str, text: str) -> None:
    chat = make_chat("qwen3", OTHERS[kind][0])
    special = [chat.encoder.get_special_token_id(marker) for marker in FAMILIES["qwen3"].special_tokens.all + TAGS]

    def frame(content: str) -> list[int]:
        ids = chat.ids({"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "a"}]})
        return [token for token in ids if token in special]

    assert frame(text) == frame("plain")


GENERATION = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{% if not hidden %}{{ '<|im_end|>' }}{% endif %}{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
)


def test_generation_blocks_say_where_the_assistant_speaks(make_chat: ChatMaker) -> None:
    chat = make_chat("qwen3", GENERATION)
    assert chat.said(RECORD) == "42<|im_end|>Because.<|im_end|>"
    theirs = chat.theirs.apply_chat_template(
        RECORD["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    (example,) = chat.render(RECORD).examples
    assert theirs["input_ids"][:-1] == example.tokens.tolist()
    assert theirs["assistant_masks"][:-1] == example.loss.astype(int).tolist()


def test_the_end_of_turn_right_behind_a_generation_block_belongs_to_it(make_chat: ChatMaker) -> None:
    source = re.sub("{% if not hidden.*endgeneration %}", "{% endgeneration %}{{ '<|im_end|>' }}", GENERATION)
    assert make_chat("qwen3", source).said(RECORD) == "42<|im_end|>Because.<|im_end|>"


REFUSED: dict[str, tuple[str, str]] = {
    "a mistake in it": ("{% for m in messages %}{{ m.content }}", "the chat template cannot be compiled: .*endfor"),
    "a tag nobody knows": ("{% speak %}", "cannot be compiled: .*unknown tag 'speak'"),
    "no loop": ("{{ messages[0].content }}", "does not write the messages in a loop"),
    "the day's date": ("{{ strftime_now('%d') }}", "cannot write this: 'strftime_now' is undefined"),
    "an answer's header that no prompt has": (
        "{% for m in messages %}{{ '# ' + m.role + '\n' + m.content }}{% endfor %}"
        "{{ 'Bot: ' if add_generation_prompt }}",
        "writes '# assistant\\\\n' before an answer, and not so where it prompts for one",
    ),
    "no answers": (
        "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
        "does not write the messages in a loop",
    ),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_templates_that_cannot_be_used_are_refused_at_once(tokenizer_path: Path, fault: str) -> None:
    source, words = REFUSED[fault]
    with pytest.raises(DataError, match=rf"{re.escape(str(tokenizer_path))}: .*{words}"):
        ChatTemplate.from_tokenizer(tokenizer_path, source)


FORGETFUL = "{% for m in messages if m.role != 'system' %}{{ m.role + m.content + '<|im_end|>' }}{% endfor %}"
CURIOUS = (
    "{% set tag = '</think>' %}{% for m in messages %}"
    "{{ m.role + '\n' + m.content.split(tag)[-1] + '<|im_end|>' }}{% endfor %}"
)
STRICT = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system texts here') }}{% endif %}"
    "{% for m in messages %}{{ m.role + m.content + '<|im_end|>' }}{% endfor %}"
)


@pytest.mark.parametrize(
    ("source", "record", "words"),
    [
        (FORGETFUL, {"system": "Be brief.", **RECORD}, r"leaves out message 0 \(system\)"),
        (FORGETFUL, {"messages": AGENT["messages"][3:]}, "leaves out the call of weather"),
        (FORGETFUL, {"tools": [WEATHER], **RECORD}, "leaves out the tool weather"),
        (CURIOUS, {"prompt": "a", "completion": "hm</think>b"}, "looks into messages for special tokens in a way"),
        (STRICT, {"system": "Be brief.", **RECORD}, "cannot write this: no system texts here"),
    ],
)
def test_nothing_is_left_out_without_a_word(
    make_chat: ChatMaker, source: str, record: dict[str, Any], words: str
) -> None:
    with pytest.raises(DataError, match=rf"chats\.jsonl:3: the chat template {words}"):
        make_chat("qwen3", source).render(record)


def written(directory: Path, family_template: str = "") -> str:
    """What the template of a tokenizer directory writes for two words."""
    template = ChatTemplate.from_tokenizer(directory, family_template)
    return template.render_conversation(parse_conversation({"prompt": "a", "completion": "b"})).text


def in_words(name: str) -> str:
    return "{% for m in messages %}{{ 'NAME ' + m.role + ': ' + m.content + eos_token }}{% endfor %}".replace(
        "NAME", name
    )


def test_the_tokenizers_own_template_goes_before_the_familys(tokenizer_path: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((tokenizer_path / "tokenizer.json").read_bytes())
    config = json.loads((tokenizer_path / "tokenizer_config.json").read_text())

    def configured(chat_template: Any) -> None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": chat_template}))

    def expected(name: str) -> str:
        return f"{name} user: a<|endoftext|>{name} assistant: b<|endoftext|>"

    configured(None)
    assert written(tmp_path, in_words("family")) == expected("family")
    configured(in_words("config"))
    assert written(tmp_path, in_words("family")) == expected("config")
    named = {"name": "default", "template": in_words("default")}, {"name": "rag", "template": "{{ documents[0] }}"}
    configured(named)
    assert written(tmp_path, in_words("family")) == expected("default")
    configured(named[1:])
    with pytest.raises(DataError, match="has chat templates called rag, and none is called default"):
        written(tmp_path, in_words("family"))
    (tmp_path / "chat_template.jinja").write_text(in_words("file"))
    assert written(tmp_path, in_words("family")) == expected("file")
