"""What a tokenized row is: its tokens, which of them are learned, and what the loss is for."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import IntEnum


class Role(IntEnum):
    """What the loss on a predicted token is for."""

    NONE = 0
    """Nothing: a prompt, a header of the chat template, padding."""
    TASK = 1
    """Next-token loss on the lesson."""
    REPLAY = 2
    """Next-token loss on old data, so that what the base knew is practised on."""
    ANCHOR = 3
    """Divergence from the base's distribution at this position; no next-token loss."""


@dataclass(frozen=True)
class Example:
    """One tokenized document of n tokens."""

    input_ids: list[int]
    """(n,) token ids, special tokens included."""
    loss_mask: list[bool]
    """(n,) True where the token belongs to a response, so that predicting it is trained. The
    first token is never True: nothing stands before it to predict it from."""
    domain: str | None = None
    """The kind of data the row is of, if its source says."""


@dataclass
class EncodeReport:
    """What became of the rows: nothing is cut or left out without being counted here."""

    rows: int = 0
    """Rows read."""
    examples: int = 0
    """Documents made of them; more than ``rows`` when rows were split or unrolled."""
    tokens: int = 0
    """Tokens in all documents."""
    response_tokens: int = 0
    """Tokens whose prediction is trained."""
    cut_response: int = 0
    """Documents whose response lost its end, for they were longer than ``max_length``."""
    cut_prompt: int = 0
    """Documents whose prompt lost its beginning, for it left no room for the response."""
    dropped_no_response: int = 0
    """Rows left out, for they have no token to learn (an empty text, no assistant turn)."""
    split: int = 0
    """Text rows longer than ``max_length``, split into several documents."""
    unrolled: int = 0
    """Conversations made into one document a turn, for the template rewrites earlier turns."""
    prompt_mismatch: int = 0
    """Documents whose template ends the prompt otherwise at inference than before a response."""

    def add(self, example: Example) -> None:
        """Count one finished document."""
        self.examples += 1
        self.tokens += len(example.input_ids)
        self.response_tokens += sum(example.loss_mask)

    def as_dict(self) -> dict[str, int]:
        """The counts by name, as they are stored beside the tokenized rows."""
        return asdict(self)
