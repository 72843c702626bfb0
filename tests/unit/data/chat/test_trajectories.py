"""Agents' trajectories: read in the shapes of SWE data sets, calls and results paired, long ones cut between turns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llm_training_toolkit.config.source_config import SourceConfig
from llm_training_toolkit.data.chat.messages import Conversation, InvalidRecord
from llm_training_toolkit.data.chat.parse import ConversationFields, parse_conversation
from llm_training_toolkit.data.sources import DocumentStats, read_source_documents
from llm_training_toolkit.errors import DataError
from tiny_chat import WEATHER, Chat, ChatMaker

Record = dict[str, Any]
SYSTEM, TASK = {"role": "system", "content": "You fix bugs."}, {"role": "user", "content": "Fix it."}
MASK = ConversationFields(masks_failed_steps=True)


@pytest.fixture(scope="module")
def qwen(make_chat: ChatMaker) -> Chat:
    return make_chat("qwen2.5")


def call(number: int, **more: Any) -> Record:
    function = {"name": "weather", "arguments": json.dumps({"step": number})}
    return {
        "role": "assistant",
        "content": f"Step {number}.",
        "tool_calls": [{"id": f"c{number}", "type": "function", "function": function}],
        **more,
    }


def result(number: int, text: str = "fine", **more: Any) -> Record:
    return {"role": "tool", "content": text, "tool_call_id": f"c{number}", **more}


def trajectory(steps: int, words: int = 1) -> Record:
    messages = [SYSTEM, TASK]
    for number in range(steps):
        messages += [call(number), result(number, f"result {number} " + "ok " * words)]
    return {"tools": [WEATHER], "messages": [*messages, {"role": "assistant", "content": "Done."}]}


def switches(record: Record, fields: ConversationFields = MASK) -> list[bool | None]:
    return [message.loss for message in parse_conversation(record, fields).messages if message.role == "assistant"]


def test_openhands_names_its_column_and_its_calls() -> None:
    """A row of nebius/SWE-rebench-openhands-trajectories, as a table gives it: null where a message has no value."""
    empty = {"tool_calls": None, "tool_call_id": None, "name": None}
    failed = "x\n[The command completed with exit code 1.]\n[Command finished with exit code 1]"
    rows = [
        SYSTEM,
        TASK,
        call(0),
        result(0, failed),
        call(1),
        result(1, "[Command finished with exit code 0]"),
        call(2),
    ]
    record = {"trajectory": [empty | row for row in rows], "tools": [WEATHER], "resolved": 1, "exit_status": "submit"}
    assert [message.role for message in parse_conversation(record).messages] == [
        *("system", "user", "assistant", "tool", "assistant", "tool", "assistant")
    ]
    assert switches(record) == [False, None, None]
    assert switches(record, ConversationFields()) == [None, None, None]
    edited = record | {"trajectory": [TASK, call(0), result(0, "ERROR:\nNo replacement was performed"), call(1)]}
    assert switches(edited) == [False, None]


def test_swe_smith_has_messages_as_text_and_lists_of_ids() -> None:
    observed = {"role": "tool", "content": [{"type": "text", "text": "OBSERVATION:\nok"}], "tool_call_ids": ["c0"]}
    messages = [SYSTEM, TASK, call(0, thought="t", agent="main"), observed, call(1)]
    found = parse_conversation({"messages": json.dumps(messages), "resolved": True, "traj_id": "a"}).messages
    assert found[3].content == "OBSERVATION:\nok"
    assert len(found) == 5
    with pytest.raises(InvalidRecord, match=r"messages is str, not a list"):
        parse_conversation({"messages": "no list"})


@pytest.mark.parametrize("role", ["tool", "user"])
def test_mini_swe_agent_says_what_a_command_returned(role: str) -> None:
    """Version 2 has results of tools; version 1 answers as the user. The role `exit` is not part of what was said."""
    text = "<returncode>{}</returncode>\n<output>\n</output>"
    steps = [call(0), result(0, text.format(2)), call(1), result(1, "", extra={"returncode": 0}), call(2), result(2)]
    steps += [call(3), result(3, "", extra={"returncode": -1})]
    if role == "user":
        steps = [
            {key: value for key, value in step.items() if key != "tool_calls"}
            | ({"role": "user", "content": step["content"] or "-"} if step["role"] == "tool" else {})
            for step in steps
        ]
    left = {"role": "exit", "content": "", "extra": {"exit_status": "Submitted", "submission": "diff"}}
    record = {"info": {"exit_status": "Submitted"}, "messages": [SYSTEM, TASK, *steps, left]}
    assert switches(record) == [False, None, None, False]
    assert [message.role for message in parse_conversation(record).messages][-1] == role


def test_exit_codes_of_tables_may_be_text_or_have_a_point() -> None:
    codes = ["0", 0.0, "1", 2.0, None]
    messages = [TASK]
    for number, code in enumerate(codes):
        messages += [call(number), result(number, "ERROR: no" if code is None else "", returncode=code)]
    assert switches({"messages": messages}) == [None, None, False, False, False]


@pytest.mark.parametrize(
    ("facts", "failed"),
    [
        ({"returncode": float("nan")}, False),
        ({"returncode": float("nan"), "extra": {"returncode": 1.0}}, True),
        ({"exit_code": False}, False),
        ({"exit_code": True}, False),
        ({"exit_code": "false", "content": "[Command finished with exit code 2]"}, True),
        ({"is_error": "false", "returncode": 1}, False),
        ({"is_error": "True"}, True),
        ({"is_error": 0.0}, False),
        ({"is_error": float("nan"), "returncode": "1"}, True),
    ],
)
def test_absent_facts_and_booleans_as_text_fail_no_step(facts: Record, failed: bool) -> None:
    """As pandas writes them: NaN is JSON for json.loads, and a column of objects has its booleans as text."""
    messages = [TASK, call(0), json.loads(json.dumps(result(0) | facts)), call(1)]
    assert switches({"messages": messages}) == [False if failed else None, None]


@pytest.mark.parametrize("names", [{"role": "function"}, {"role": "observation"}, {"from": "tool"}])
def test_an_error_in_the_text_counts_in_every_name_of_the_role(names: Record) -> None:
    error = {"content": "ERROR:\nNo replacement was performed", **names}
    assert switches({"messages": [TASK, call(0), error, call(1)]}) == [False, None]
    said = {"role": "assistant", "content": "Look."}
    assert switches({"messages": [TASK, said, error | {"from": "user", "role": "user"}]}) == [None]


def test_one_message_may_answer_several_calls() -> None:
    two = call(0) | {"tool_calls": [*call(0)["tool_calls"], *call(1)["tool_calls"]]}
    both = {"role": "tool", "content": "fine", "tool_call_ids": ["c0", "c1"]}
    assert len(parse_conversation({"messages": [TASK, two, both, call(2)]}).messages) == 4
    with pytest.raises(InvalidRecord, match=r"messages\[3\] is one result more than message 1 has calls"):
        parse_conversation({"messages": [TASK, two, both, result(1), call(2)]})
    with pytest.raises(InvalidRecord, match=r"messages\[1\] calls 2 tools and 1 results follow"):
        parse_conversation({"messages": [TASK, two, both | {"tool_call_ids": ["c1"]}, call(2)]})


def test_a_message_decides_before_the_outcome_does() -> None:
    messages = [TASK, call(0, loss=True), result(0, "", is_error=True), call(1, loss=False), result(1), call(2)]
    assert switches({"messages": messages}) == [True, False, None]


FAULTS: dict[str, tuple[list[Record], str, str]] = {
    "a call without a result": ([TASK, call(0), TASK], "call_without_result", r"messages\[1\] calls 1 tools and 0 res"),
    "a call that the next one overtakes": (
        [TASK, call(0), call(1), result(1)],
        "call_without_result",
        r"messages\[1\]",
    ),
    "a result without a call": ([TASK, result(0), call(1)], "result_without_call", r"messages\[1\] is the result"),
    "two results of a call": ([TASK, call(0), result(0), result(0)], "result_without_call", r"messages\[3\] is one"),
    "another id": ([TASK, call(0), result(7)], "tool_call_id", r"messages\[2\] answers the call 'c7', and open are c0"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_calls_and_results_that_do_not_fit_are_counted(kind: str, tmp_path: Path) -> None:
    messages, reason, why = FAULTS[kind]
    with pytest.raises(InvalidRecord, match=why) as caught:
        parse_conversation({"messages": messages})
    assert caught.value.reason == reason
    lines = [trajectory(1), {"messages": messages}, trajectory(2)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    source = SourceConfig(path=str(tmp_path / "a.jsonl"), format="chat")
    tally = DocumentStats()
    assert len(list(read_source_documents(source, 0, on_error="skip", tally=tally))) == 2
    assert (dict(tally.skipped), tally.read) == ({reason: 1}, 3)
    with pytest.raises(DataError, match=r"a\.jsonl:2"):
        list(read_source_documents(source, 0))


def test_calls_within_the_text_and_the_end_of_a_run_are_no_faults() -> None:
    parse_conversation({"messages": [TASK, {"role": "assistant", "content": "<tool_call>…"}, result(0), call(1)][:3]})
    two = call(0) | {"tool_calls": [*call(0)["tool_calls"], *call(1)["tool_calls"]]}
    parse_conversation({"messages": [TASK, two, result(1), result(0), two, result(0)]})


def test_only_runs_that_succeeded(tmp_path: Path) -> None:
    """A column decides, or a field of a column; files of one indented object are records."""
    table = tmp_path / "a.parquet"
    rows = [{"messages": trajectory(n)["messages"], "info": {"exit_status": s}} for n, s in ((1, "ok"), (2, "no"))]
    pq.write_table(pa.Table.from_pylist(rows), table)
    folder = tmp_path / "runs"
    folder.mkdir()
    for number, status in enumerate(["Submitted", "LimitsExceeded", "Submitted"]):
        run = {"info": {"exit_status": status}, "messages": trajectory(number)["messages"]}
        (folder / f"{number}.traj.json").write_text(json.dumps(run, indent=2), encoding="utf-8")
    for path, wanted, kept in ((table, "ok", 1), (folder, "Submitted", 2)):
        source = SourceConfig.model_validate(
            {"path": str(path), "format": "chat", "filter": {"info.exit_status": wanted}}
        )
        tally = DocumentStats()
        assert len(list(read_source_documents(source, 0, tally=tally))) == kept
        assert tally.dropped == {"filtered": 1}


def tag_generation(source: str) -> str:
    """Qwen's template with the tags by which transformers finds what the assistant says."""
    head, calls, end = (
        "{{- '<|im_start|>assistant\\n' + message.content }}",
        "{{- write_calls(message, '\\n' if message.content else '') }}",
        "{{- '<|im_end|>\\n' }}",
    )
    start = source.index(head)
    turn = source[start : source.index(end, start) + len(end)]
    assert calls in turn
    tagged = "{{- '<|im_start|>assistant\\n' }}{% generation %}{{- message.content }}" + calls
    return source.replace(turn, tagged + "{{- '<|im_end|>' }}{% endgeneration %}{{- '\\n' }}")


def find_their_mask(chat: Chat, conversation: Conversation) -> tuple[list[int], list[bool]]:
    """Tokens and mask of transformers for a conversation."""
    messages = [
        {"role": message.role, "content": message.content}
        | (
            {
                "tool_calls": [
                    {"type": "function", "function": {"name": each.name, "arguments": json.loads(each.arguments)}}
                    for each in message.tool_calls
                ]
            }
            if message.tool_calls
            else {}
        )
        for message in conversation.messages
    ]
    found = chat.theirs.apply_chat_template(
        messages,
        tools=[json.loads(tool) for tool in conversation.tools],
        chat_template=tag_generation(chat.source),
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    return found["input_ids"], [bool(each) for each in found["assistant_masks"]]


def test_the_mask_is_that_of_transformers(qwen: Chat) -> None:
    record = trajectory(4)
    (ours,) = qwen.render(record).examples
    ids, mask = find_their_mask(qwen, parse_conversation(record))
    assert ours.tokens.tolist() == ids[: len(ours.tokens)]
    assert ours.loss.tolist() == mask[: len(ours.loss)]
    assert not any(mask[len(ours.loss) :])


def test_results_of_tools_are_never_learnt(qwen: Chat) -> None:
    said = qwen.said(trajectory(3), loss="all")
    assert "Fix it." in said
    assert "Step 2." in said
    assert "result" not in said


def test_a_failed_step_is_masked_with_every_loss(qwen: Chat) -> None:
    """Also with `all`: the turn stays in the context, and its end bears no loss either."""
    messages = [TASK, call(0), result(0, returncode=1), call(1), result(1, returncode=0), call(2), result(2)]
    record = json.loads(parse_conversation({"messages": messages[:-1]}, MASK).to_text())
    for loss in ("assistant", "all"):
        (example,) = qwen.render(record, loss=loss).examples
        said = qwen.encoder.decode(example.tokens[example.loss])
        assert [f"Step {number}." in said for number in range(3)] == [False, True, True]
        ends = example.loss[example.tokens == qwen.encoder.get_special_token_id("<|im_end|>")]
        assert len(ends) - ends.sum() == {"assistant": 5, "all": 3}[loss]
    assert "Fix it." in said


def count_head(chat: Chat) -> int:
    """Tokens of system text, tools and task, with a short answer."""
    return len(chat.ids({"tools": [WEATHER], "messages": [SYSTEM, TASK, {"role": "assistant", "content": "!"}]}))


@pytest.mark.parametrize("steps", [8, 23])
def test_windows_begin_with_the_task_and_teach_every_turn_once(qwen: Chat, steps: int) -> None:
    record = trajectory(steps, words=5)
    head = count_head(qwen)
    length = head + 300
    assert len(qwen.ids(record)) > 2 * length
    found = qwen.render(record, sequence_length=length, overlong="window")
    assert len(found.examples) > 2
    assert found.tokens == len(qwen.ids(record))
    learnt = []
    for number, example in enumerate(found.examples):
        text = qwen.encoder.decode(example.tokens)
        assert len(example.tokens) <= length
        assert text.startswith(qwen.encoder.decode(qwen.render(record).examples[0].tokens[: head - 3]))
        assert example.loss[-1]
        first = int(np.flatnonzero(example.loss)[0])
        shown = qwen.encoder.decode(example.tokens[:first])
        assert bool(number) == ("result" in shown)  # the turn before the first to learn is shown
        learnt.append(qwen.encoder.decode(example.tokens[example.loss]))
    assert "".join(learnt) == qwen.said(record)


def test_windows_are_conversations_of_the_template(make_chat: ChatMaker) -> None:
    """Reasoning is in a window what the template makes of the window's messages."""
    qwen3 = make_chat("qwen3")
    messages = [SYSTEM, TASK]
    for number in range(12):
        messages += [call(number, reasoning_content=f"Thought {number}."), result(number, "result " * 8)]
    record = {"tools": [WEATHER], "messages": messages}
    found = qwen3.render(record, sequence_length=900, overlong="window").examples
    assert len(found) > 1
    said = "".join(qwen3.encoder.decode(each.tokens[each.loss]) for each in found)
    assert [said.count(f"Thought {number}.") for number in range(12)] == [1] * 12


def test_loss_of_windows_can_be_chosen(qwen: Chat) -> None:
    record, length = trajectory(20, words=5), count_head(qwen) + 300
    (last,) = qwen.render(record, sequence_length=length, overlong="window", loss="last_turn").examples
    assert qwen.encoder.decode(last.tokens[last.loss]) == "Done.<|im_end|>"
    every = qwen.render(record, sequence_length=length, overlong="window", loss="all").examples
    said = "".join(qwen.encoder.decode(each.tokens[each.loss]) for each in every)
    assert [said.count(f"Step {number}.") for number in range(20)] == [1] * 20
    assert "result" not in said
    failed = [
        message | {"loss": False} if message["role"] == "assistant" else message for message in record["messages"]
    ]
    silent = record | {"messages": failed}
    dropped = qwen.render(silent, sequence_length=length, overlong="window")
    assert (dropped.examples, dropped.dropped) == ([], "no_loss")


def test_a_turn_that_does_not_fit_with_its_prompt_costs_the_conversation(qwen: Chat) -> None:
    record, length = trajectory(2, words=900), count_head(qwen) + 300
    found = qwen.render(record, sequence_length=length, overlong="window")
    assert (found.examples, found.dropped) == ([], "too_long")
    assert found.tokens > length
