"""Growing files as segments: cut where something ends, joined again whatever was merged."""

from __future__ import annotations

import struct

from hypothesis import given
from hypothesis import strategies as st

from llm_training_toolkit.runs.storage.append_log import (
    LogSegment,
    build_segment_key,
    count_complete_bytes,
    get_end_offset,
    group_segments_by_file,
    is_append_only,
    select_tail_segments,
)

Sizes = st.lists(st.integers(1, 50), min_size=1, max_size=20)


def test_what_is_appended_grows_and_what_is_replaced_does_not() -> None:
    growing = (
        "metrics.jsonl",
        "tb/events.out.tfevents.1.host",
        "eval/tb/events",
        "logs/attempt_1/rank_0.log",
        "samples/x",
    )
    assert all(map(is_append_only, growing))
    whole_files = ("config.yaml", "attempts/0001.json", "eval/perplexity.json", "eval/at_end", "data/dataset_info.json")
    assert not any(map(is_append_only, whole_files))


@given(Sizes, st.data())
def test_a_merged_segment_stands_for_those_within_it(sizes: list[int], data: st.DataObject) -> None:
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    stored = {build_segment_key("metrics.jsonl", start): size for start, size in zip(starts, sizes, strict=True)}
    first = data.draw(st.integers(0, len(sizes) - 1))
    last = data.draw(st.integers(first, len(sizes) - 1))
    stored[build_segment_key("metrics.jsonl", starts[first])] = sum(sizes[first : last + 1])
    for gone in starts[first + 1 : data.draw(st.integers(first + 1, last + 1))]:  # as far as the deletion came
        del stored[build_segment_key("metrics.jsonl", gone)]
    found = group_segments_by_file(stored | {"plan.json": 7})["metrics.jsonl"]
    assert [segment.end for segment in found[:-1]] == [segment.start for segment in found[1:]]
    assert (found[0].start, get_end_offset(found)) == (0, sum(sizes))


@given(Sizes, st.integers(1, 2_000))
def test_a_tail_is_as_few_segments_as_hold_it(sizes: list[int], wanted: int) -> None:
    found = [LogSegment(sum(sizes[:index]), size) for index, size in enumerate(sizes)]
    last = select_tail_segments(found, wanted)
    held = sum(segment.size for segment in last)
    assert last == found[len(found) - len(last) :]
    assert held >= min(wanted, sum(sizes))
    assert held - last[0].size < wanted


@given(st.lists(st.binary(max_size=20), max_size=5), st.integers(0, 300))
def test_events_are_cut_between_records_and_lines_behind_their_ends(bodies: list[bytes], cut: int) -> None:
    records = [struct.pack("<Q", len(body)) + b"crc!" + body + b"crc!" for body in bodies]
    content = b"".join(records)[:cut]
    ends = [sum(map(len, records[:count])) for count in range(len(records) + 1)]
    assert count_complete_bytes("tb/events.out.tfevents.1", content) == max(end for end in ends if end <= len(content))
    lines = b"".join(body.replace(b"\n", b"") + b"\n" for body in bodies)[:cut]
    assert count_complete_bytes("metrics.jsonl", lines) == lines.rfind(b"\n") + 1
