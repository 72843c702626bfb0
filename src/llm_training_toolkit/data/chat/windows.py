"""Windows of a conversation that is longer than a sequence, cut between turns.

Every window begins with the messages before the first answer (system text and task). Then come turns that are only
shown, up to half of the window and at least the one before, and the turns to learn. A turn is an assistant's message
with the messages after it, so that a call and its results stay together. Every answer is learnt in one window.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from llm_training_toolkit.data.chat.messages import Conversation


class TokenSpan(NamedTuple):
    """Tokens [start, stop)."""

    start: int
    stop: int


@dataclass(frozen=True)
class ConversationWindow:
    """Conversation of a window that ends with an answer.

    first_learnt: number of the first message to learn, 0 in the first window. is_last: it has the last turn.
    """

    conversation: Conversation
    first_learnt: int
    is_last: bool

    def mask_turns(self, *, keep: bool) -> Conversation:
        """Return the conversation, its answers without loss unless they ask for it; `keep` excepts the last one."""
        messages = list(self.conversation.messages)
        for number, message in enumerate(messages[: -1 if keep else None]):
            if message.role == "assistant" and message.loss is None:
                messages[number] = replace(message, loss=False)
        return replace(self.conversation, messages=tuple(messages))


def cut_into_windows(
    conversation: Conversation,
    answers: Sequence[TokenSpan],
    count_tokens: Callable[[ConversationWindow], int],
    length: int,
) -> list[ConversationWindow] | None:
    """Return windows of at most `length` tokens, None if an answer with its prompt does not fit into one.

    answers: tokens [start, stop) of each answer in the whole conversation. They are estimates, because a template may
    write a message otherwise in a window; `count_tokens` decides.
    """
    windows: list[ConversationWindow] = []
    first = 0
    while first < len(answers):
        window = _fill_window(conversation, answers, first, count_tokens, length)
        if window is None:
            return None
        windows.append(window)
        first += sum(message.role == "assistant" for message in window.conversation.messages[window.first_learnt :])
    return windows


def _fill_window(
    conversation: Conversation,
    answers: Sequence[TokenSpan],
    first: int,
    count_tokens: Callable[[ConversationWindow], int],
    length: int,
) -> ConversationWindow | None:
    """Return the window that learns from the answer `first` on, None if that does not fit with the one before it."""

    def estimate(begin: int, last: int) -> int:
        return answers[0].start + answers[last].stop - answers[begin].start

    nearest = max(first - 1, 0)
    begin = next((begin for begin in range(nearest) if estimate(begin, first) <= length // 2), nearest)
    last = max((last for last in range(first, len(answers)) if estimate(begin, last) <= length), default=first)
    while True:
        window = _build_window(conversation, begin, first, last)
        if count_tokens(window) <= length:
            return window
        if last > first:
            last -= 1
        elif begin < nearest:
            begin += 1
        else:
            return None


def _build_window(conversation: Conversation, begin: int, first: int, last: int) -> ConversationWindow:
    """Return the window of the answers `begin` to `last`, of which those from `first` on are learnt."""
    places = [number for number, message in enumerate(conversation.messages) if message.role == "assistant"]
    kept = conversation.messages[: places[0]] + conversation.messages[places[begin] : places[last] + 1]
    first_learnt = places[0] + places[first] - places[begin] if first else 0
    return ConversationWindow(replace(conversation, messages=kept), first_learnt, last == len(places) - 1)
