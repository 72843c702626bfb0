"""The server through OpenAI's own client: answers, streams, infilling, many clients."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from llm_training_toolkit.models.sampling import SamplingParams
from served import CONTEXT, Served

PREFIX, SUFFIX = "def area(width, height):\n", "\n    return area\n"
MESSAGES: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is an area?"}]


def complete(served: Served, **fields: Any) -> Any:
    """A greedy completion of 12 tokens, unless told otherwise."""
    return served.client.completions.create(**{"model": "tiny", "max_tokens": 12, "temperature": 0, **fields})


def test_completion_and_infill_equal_those_of_the_generator(served: Served) -> None:
    how = SamplingParams(max_new_tokens=12)
    done = complete(served, prompt=PREFIX)
    assert done.choices[0].text == served.generator.complete_prompt(PREFIX, how).text
    assert done.usage.prompt_tokens == len(served.generator.encoder.encode(PREFIX))
    assert done.usage.total_tokens == done.usage.prompt_tokens + 12
    assert done.choices[0].finish_reason == "length"
    filled = complete(served, prompt=PREFIX, suffix=SUFFIX)
    assert filled.choices[0].text == served.generator.fill_middle(PREFIX, SUFFIX, how).text
    assert filled.choices[0].text != done.choices[0].text


def test_chat_equals_the_generator_and_takes_messages_in_parts(served: Served) -> None:
    answer = served.client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=9, temperature=0)
    chat = served.generator.start_chat("Be brief.")
    wanted = chat.send_message(MESSAGES[1]["content"], SamplingParams(max_new_tokens=9)).text
    assert answer.choices[0].message.content == wanted.lstrip("\n")
    parts: Any = [MESSAGES[0], {"role": "user", "content": [{"type": "text", "text": MESSAGES[1]["content"]}]}]
    again = served.client.chat.completions.create(model="tiny", messages=parts, max_tokens=9, temperature=0)
    assert again.choices[0].message.content == answer.choices[0].message.content


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_streams_equal_whole_answers(served: Served, temperature: float) -> None:
    asked: Any = {"temperature": temperature, "seed": 5, "top_p": 0.9, "max_tokens": 24}
    whole = complete(served, prompt=PREFIX, **asked)
    options: Any = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = complete(served, prompt=PREFIX, **asked, **options)
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert len(chunks) > 3
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert last.usage == whole.usage
    create = served.client.chat.completions.create
    answer = create(model="tiny", messages=MESSAGES, **asked)
    deltas = [chunk.choices[0].delta for chunk in create(model="tiny", messages=MESSAGES, stream=True, **asked)]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == answer.choices[0].message.content


def test_a_seed_repeats_an_answer_and_without_one_answers_differ(served: Served) -> None:
    first, second = (complete(served, prompt=PREFIX, temperature=1, seed=7).choices[0].text for _ in range(2))
    assert first == second
    unseeded = {complete(served, prompt=PREFIX, temperature=1).choices[0].text for _ in range(3)}
    assert len(unseeded) > 1


def test_a_stop_text_ends_the_answer_and_is_left_out(served: Served) -> None:
    whole = complete(served, prompt=PREFIX, max_tokens=24).choices[0].text
    stop = whole[9:13]
    cut = complete(served, prompt=PREFIX, max_tokens=24, stop=["not in it", stop])
    assert (cut.choices[0].text, cut.choices[0].finish_reason) == (whole[: whole.index(stop)], "stop")


def test_twenty_clients_at_once_get_the_answers_that_each_would_get_alone(served: Served) -> None:
    prompts = [f"{PREFIX}    # {'x' * number}\n" for number in range(20)]
    alone = [served.generator.complete_prompt(prompt, SamplingParams(max_new_tokens=12)).text for prompt in prompts]
    served.gate.close()  # so that all of them wait before the first is answered
    with ThreadPoolExecutor(20) as clients:
        asked = [clients.submit(complete, served, prompt=prompt) for prompt in prompts]
        try:
            served.wait_for_requests(len(prompts))
        finally:
            served.gate.open()
        assert [each.result().choices[0].text for each in asked] == alone


def test_the_model_says_what_it_can_do(served: Served) -> None:
    [model] = served.client.models.list().data
    assert model.id == served.client.models.retrieve("tiny").id == "tiny"
    extra: Any = model.model_extra
    assert (extra["chat"], extra["infill"], extra["tools"], extra["context_length"]) == (True, True, True, CONTEXT)
