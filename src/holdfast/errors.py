"""What holdfast says when it cannot go on.

Two kinds, and each has its exit code (`docs/exit-codes.md`): the request was wrong (2), or
something of ours or the machine's failed (1).
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class HoldfastError(Exception):
    """Something failed that the user did not cause; exit code 1."""

    exit_code = 1


class RequestError(HoldfastError, ValueError):
    """The request was wrong: recipe, data, model, checkpoint or arguments; exit code 2.

    The message is one line that says what is wrong, where, and how to mend it. Several problems
    found together are joined by newlines, one line each.
    """

    exit_code = 2

    def __init__(self, *problems: str) -> None:
        self.problems = tuple(" ".join(problem.split()) for problem in problems)
        super().__init__("\n".join(self.problems))


class NotFiniteError(RequestError):
    """A model whose logits are not numbers, of which nothing can be read."""


def did_you_mean(word: str, allowed: Iterable[str]) -> str:
    """A hint for a mistyped name: ``did you mean 'kl_anchor'?``, or what is allowed."""
    allowed = sorted(allowed)
    close = get_close_matches(word, allowed, n=1, cutoff=0.6)
    if close:
        return f"did you mean '{close[0]}'?"
    return f"allowed: {', '.join(allowed)}"
