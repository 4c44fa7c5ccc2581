"""The few kinds of errors a person can meet; anything else is a bug of ours."""

from __future__ import annotations


class IntarsiaError(Exception):
    """An error with a sentence for the person and a way out.

    Args:
        message: What is wrong, in one sentence.
        hint: What to do about it, in one sentence; may be empty.
    """

    code = "error"

    def __init__(self, message: str, hint: str = "") -> None:
        self.message, self.hint = printable(message), printable(hint)
        super().__init__(self.message, self.hint)  # both in args: errors cross process borders by pickle

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()


def printable(text: str) -> str:
    """Put a mark for what cannot be shown: no name of a stranger's file may steer a terminal or break a line."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


class InputError(IntarsiaError):
    """A value a person gave is outside what is possible; names the field, the value and the bounds."""

    code = "input"


class AdapterError(IntarsiaError):
    """An adapter file cannot be read, identified or attached."""

    code = "adapter"


class WeightsError(IntarsiaError):
    """A model or a part of it is missing; says where it was looked for."""

    code = "weights"


class MemoryLimitError(IntarsiaError):
    """Memory or disk does not suffice; says what is needed, what is free, and what to lower."""

    code = "memory"


class Cancelled(Exception):  # noqa: N818 - a person's wish, not an error
    """Raised inside a generator of events when its token was cancelled."""
