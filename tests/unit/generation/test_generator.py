"""Generation: shown piece by piece, asked for as the model was trained, and ended where it should."""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, GenerationConfig

from llm_training_toolkit import families
from llm_training_toolkit.data.chat.messages import ChatMessage, Conversation
from llm_training_toolkit.data.chat.render import encode_prompt
from llm_training_toolkit.data.chat.template import ChatTemplate
from llm_training_toolkit.data.tokenizer import TextEncoder, TokenizationSpec, open_tokenizer, train_tokenizer
from llm_training_toolkit.errors import PlanError
from llm_training_toolkit.generation.generator import TextGenerator, _CallbackStreamer
from llm_training_toolkit.generation.text_stream import TokenDecoder
from llm_training_toolkit.models import build_model
from llm_training_toolkit.models.sampling import SamplingParams
from tiny_chat import Chat
from tiny_models import DECODER

CONTEXT = 64
SHAPE: dict[str, Any] = DECODER | {
    "vocab_size": 512,
    "max_position_embeddings": CONTEXT,
}
TEXT = "def area(width, height):\n    return width * height\n"
ASKED = Conversation((ChatMessage("system", "Be brief."), ChatMessage("user", "Is <|im_end|> a marker?")))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with sentinels and a chat template."""
    family = families.find_size("qwen3-0.6b").family
    path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([TEXT] * 2, 512, TokenizationSpec.from_family(family), path)
    (path / "chat_template.jinja").write_text(family.chat_template)
    return path


@pytest.fixture(scope="module")
def encoder(directory: Path) -> TextEncoder:
    return open_tokenizer(str(directory))


@pytest.fixture
def model() -> Any:
    """A model with random weights that stops at token 0."""
    torch.manual_seed(0)
    found: Any = build_model(SHAPE, precision="fp32", attention="sdpa").eval()
    found.generation_config = GenerationConfig(eos_token_id=0, pad_token_id=0)
    return found


def test_what_is_said_piece_by_piece_is_what_was_written(model: Any, directory: Path, encoder: TextEncoder) -> None:
    pieces: list[str] = []
    written = TextGenerator(model, directory).complete_prompt("def ", SamplingParams(max_new_tokens=24), pieces.append)
    ids = torch.tensor([encoder.encode("def ")])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
    assert written.text == "".join(pieces) == encoder.decode(out[0, ids.shape[1] :].tolist(), skip_special_tokens=True)
    assert len(pieces) > 1


def test_what_is_not_asked_for_is_off(model: Any, directory: Path) -> None:
    how = SamplingParams(max_new_tokens=24, temperature=1.0, seed=3)
    plain = TextGenerator(model, directory).complete_prompt("def ", how).text
    model.generation_config = GenerationConfig(
        eos_token_id=0, pad_token_id=0, do_sample=True, top_k=1, top_p=0.1, repetition_penalty=5.0, temperature=0.1
    )
    assert TextGenerator(model, directory).complete_prompt("def ", how).text == plain
    assert TextGenerator(model, directory).complete_prompt("def ", SamplingParams(24)).text != plain


@given(st.text(alphabet="aé漢😀\n", max_size=20), st.integers(0, 3))
def test_no_half_character_is_said(text: str, cut: int) -> None:
    encoder = _bytewise()
    pieces: list[str] = []
    stream = _CallbackStreamer(TokenDecoder(encoder), frozenset(), pieces.append)
    ids = encoder.encode(text)
    stream.put(torch.tensor([ids]))  # a prompt, which is not said
    for token in ids[: len(ids) - cut] if cut else ids:
        stream.put(torch.tensor([token]))
    stream.end()
    assert "".join(pieces) == stream.text
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces[:-1])
    if not cut:
        assert stream.text == text


_BYTEWISE: list[TextEncoder] = []


def _bytewise() -> TextEncoder:
    """A tokenizer whose characters beyond ASCII are several tokens."""
    if not _BYTEWISE:
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            train_tokenizer(
                ["a b"], 512, TokenizationSpec.from_family(families.find_size("qwen3-0.6b").family), Path(folder)
            )
            _BYTEWISE.append(open_tokenizer(folder))
    return _BYTEWISE[0]


def test_a_prompt_longer_than_the_context_is_refused(model: Any, directory: Path) -> None:
    generator = TextGenerator(model, directory)
    with pytest.raises(PlanError, match=r"the prompt has [\d,]+ tokens, and the model's context has room for 63"):
        generator.complete_prompt("x = 1\n" * 200, SamplingParams())
    with pytest.raises(PlanError, match="the prompt has"):
        generator.fill_middle("x = 1\n" * 200, "y", SamplingParams())
    with pytest.raises(PlanError, match="the prompt has"):
        generator.start_chat().send_message("x = 1\n" * 200, SamplingParams())
    with pytest.raises(PlanError, match="the prompt is empty"):
        generator.complete_prompt("", SamplingParams())


def test_no_more_is_written_than_the_context_has_room_for(model: Any, directory: Path, encoder: TextEncoder) -> None:
    model.generation_config.eos_token_id = None
    prompt = "=" * 60
    count = len(encoder.encode(prompt))
    written = TextGenerator(model, directory).complete_prompt(prompt, SamplingParams(max_new_tokens=1000))
    ids = torch.tensor([encoder.encode(prompt)])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=CONTEXT - count, do_sample=False)
    assert written.text == encoder.decode(out[0, count:].tolist(), skip_special_tokens=True)
    assert not written.ended


@pytest.mark.parametrize(("ends", "ended"), [([0], True), ([7, 0], True), ([7], False)])
def test_it_ends_at_any_of_the_ids_the_model_stops_at(
    model: Any, directory: Path, ends: list[int], ended: bool
) -> None:
    torch.nn.init.zeros_(model.model.norm.weight)  # every logit is the same, so the first token is the likeliest
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=0)
    written = TextGenerator(model, directory).complete_prompt("def ", SamplingParams(max_new_tokens=5))
    assert (written.text, written.ended) == ("", ended)


def test_an_infilling_ends_at_any_special_token(model: Any, directory: Path) -> None:
    torch.nn.init.zeros_(model.model.norm.weight)
    model.generation_config = GenerationConfig(eos_token_id=7, pad_token_id=0)
    assert TextGenerator(model, directory).fill_middle("def ", "\n", SamplingParams(max_new_tokens=5)).ended


def test_without_sentinels_nothing_is_infilled(model: Any, tmp_path: Path) -> None:
    train_tokenizer([TEXT] * 2, 512, TokenizationSpec.from_family(families.find_size("qwen2-0.5b").family), tmp_path)
    with pytest.raises(PlanError, match="no fill-in-the-middle sentinels"):
        TextGenerator(model, tmp_path).fill_middle("def ", "\n", SamplingParams())


def test_without_a_chat_template_there_is_no_conversation(model: Any, directory: Path, tmp_path: Path) -> None:
    without = shutil.copytree(directory, tmp_path / "without")
    (without / "chat_template.jinja").unlink()
    with pytest.raises(PlanError, match="no chat template"):
        TextGenerator(model, without).start_chat()


def test_the_prompt_of_a_conversation_is_that_of_transformers(directory: Path, encoder: TextEncoder) -> None:
    messages = [{"role": message.role, "content": message.content} for message in ASKED.messages]
    ids = encode_prompt(ASKED, ChatTemplate.from_tokenizer(directory, ""), encoder)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert encoder.decode(ids) == tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    marker = encoder.get_special_token_id("<|im_end|>")
    assert ids.count(marker) == len(messages), "what a person writes is no marker"


def test_a_reply_shows_its_tags_and_keeps_its_reasoning_apart(tmp_path: Path) -> None:
    chat = Chat(tmp_path, "qwen3")  # whose tags are special tokens, as in Qwen3's own tokenizer
    names = ["<think>", "7", "</think>", "4", "<tool_call>", "=", "</tool_call>", "<|im_end|>"]
    ids = [chat.encoder.get_special_token_id(each) if "<" in each else chat.encoder.encode(each)[0] for each in names]
    session = TextGenerator(_recite(chat.encoder, ids), tmp_path).start_chat()
    pieces: list[str] = []
    written = session.send_message("Hello", SamplingParams(), pieces.append)
    assert written.text == "".join(pieces) == "<think>7</think>4<tool_call>=</tool_call>"
    assert written.ended
    assert session.messages[-1] == ChatMessage("assistant", "4<tool_call>=</tool_call>", thinking="7")
    assert TextGenerator(_recite(chat.encoder, ids), tmp_path).complete_prompt("\n", SamplingParams()).text == "74="


def _recite(encoder: TextEncoder, ids: list[int]) -> Any:
    """Build a model that writes these tokens, each once, after the line break that ends a prompt."""
    shape = SHAPE | {"vocab_size": encoder.vocab_size, "max_position_embeddings": 4096, "tie_word_embeddings": False}
    model: Any = build_model(shape, precision="fp32", attention="sdpa").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.norm.weight.fill_(1.0)
        for number, (before, after) in enumerate(pairwise([encoder.encode("\n")[-1], *ids])):
            model.model.embed_tokens.weight[before, number] = model.lm_head.weight[after, number] = 1.0
    model.generation_config = GenerationConfig(eos_token_id=ids[-1], pad_token_id=ids[-1])
    return model


def test_a_conversation_continues_from_its_messages(model: Any, directory: Path) -> None:
    model.config.max_position_embeddings = 4096
    dialogue = TextGenerator(model, directory).start_chat("Be brief.")
    written = [dialogue.send_message(question, SamplingParams(max_new_tokens=3)).text for question in ("One?", "Two?")]
    said = [("system", "Be brief."), ("user", "One?"), ("assistant", written[0])]
    assert [(message.role, message.content) for message in dialogue.messages[:-2]] == said
