"""Windows of a conversation that is longer than a sequence, cut between turns.

Every window begins with the messages before the first answer (system text and task). Then come turns that are only
shown, up to half of the window and at least the one before, and the turns to learn. A turn is an assistant's message
with the messages after it, so that a call and its results stay together. Every answer is learnt in one window.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from llm_training_toolkit.data.chat.messages import Conversation


@dataclass(frozen=True)
class ConversationWindow:
    """Conversation of a window that ends with an answer.

    shown: number of the message from which on answers are learnt, 0 in the first window. is_last: it has the last turn.
    """

    conversation: Conversation
    shown: int
    is_last: bool

    def mask_turns(self, *, keep: bool) -> Conversation:
        """Return the conversation, its answers without loss unless they ask for it; `keep` excepts the last one."""
        messages = list(self.conversation.messages)
        for number, message in enumerate(messages[: -1 if keep else None]):
            if message.role == "assistant" and message.loss is None:
                messages[number] = replace(message, loss=False)
        return replace(self.conversation, messages=tuple(messages))


def cut_into_windows(
    conversation: Conversation, count_tokens: Callable[[ConversationWindow], int], length: int
) -> list[ConversationWindow] | None:
    """Return windows of at most `length` tokens, None if an answer with its prompt does not fit into one."""
    answers = [number for number, message in enumerate(conversation.messages) if message.role == "assistant"]
    windows: list[ConversationWindow] = []
    first = 0
    while first < len(answers):
        window = _fill_window(conversation, answers, first, count_tokens, length)
        if window is None:
            return None
        windows.append(window)
        first += sum(
            message.role == "assistant" for message in window.conversation.messages[window.shown or answers[0] :]
        )
    return windows


def _fill_window(
    conversation: Conversation,
    answers: Sequence[int],
    first: int,
    count_tokens: Callable[[ConversationWindow], int],
    length: int,
) -> ConversationWindow | None:
    """Return the window that learns from the answer `first` on, None if that does not fit with the one before it."""

    def build(begin: int, last: int) -> ConversationWindow:
        kept = conversation.messages[: answers[0]] + conversation.messages[answers[begin] : answers[last] + 1]
        shown = answers[0] + answers[first] - answers[begin] if first else 0
        return ConversationWindow(replace(conversation, messages=kept), shown, last == len(answers) - 1)

    # Both searches rely on lengths that grow with the number of turns.
    shown = range(1, first + 1)  # turns before the first to learn
    fitting = bisect_right(shown, length // 2, key=lambda count: count_tokens(build(first - count, first)))
    begin = first - max(fitting, min(first, 1))
    learnt = range(first, len(answers))
    fitting = bisect_right(learnt, length, key=lambda last: count_tokens(build(begin, last)))
    return build(begin, first + fitting - 1) if fitting else None
