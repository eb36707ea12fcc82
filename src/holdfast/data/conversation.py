"""A conversation through the tokenizer's own chat template, with the assistant's tokens marked.

Where the template has ``{% generation %}`` markers they say which tokens are the assistant's.
Where it has none, the assistant's turn i is what the template adds between

    before = render(messages[:i], add_generation_prompt=True)
    after  = render(messages[:i+1])

in characters of the text; the whole text is then tokenized once, as at inference, and a token is
the assistant's if any of its characters is. The end-of-turn token is part of the turn.

Some templates rewrite earlier turns once a later one stands (Qwen3 and DeepSeek-R1 strip the
thinking of all but the last answer), so that no single rendering shows every turn as the model
would have written it. Such a conversation is **unrolled**: one document for each assistant turn,
ended there, with the loss on that turn only; each document is what the model sees at inference.
A template that changes the *other* turns when a turn is added cannot be learned from: refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from holdfast.errors import RequestError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
Span = tuple[int, int]

_MARKERS = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Rendered:
    """One conversation as tokens."""

    input_ids: list[int]
    """(n,) token ids; special tokens are those the template wrote."""
    loss_mask: list[bool]
    """(n,) True on the assistant's tokens."""
    prompt_mismatch: bool = False
    """Whether the template ends a prompt otherwise at inference than before a response."""


class Conversation:
    """Messages, and the template of a tokenizer that renders them.

    Args:
        messages: the turns, each ``{"role": ..., "content": ...}``.
        tokenizer: any ``transformers`` tokenizer with a chat template.
        where: the row's place, for messages.
        given: how many of the first messages are the prompt: their turns are not learned.
        tools: tool schemas for the template, a list or its JSON text.
        settings: further variables for the template (``enable_thinking``).
    """

    def __init__(
        self,
        messages: Sequence[Message],
        tokenizer: PreTrainedTokenizerBase,
        *,
        where: str,
        given: int = 0,
        tools: list[Any] | str | None = None,
        settings: dict[str, Any] | None = None,
    ) -> None:
        self.messages = list(messages)
        self.tokenizer = tokenizer
        self.where = where
        self.given = given
        self.settings = {
            **(settings or {}),
            "tools": json.loads(tools) if isinstance(tools, str) else tools,
        }

    def documents(self) -> list[Rendered]:
        """The conversation as one document, or as one for each turn if it must be unrolled."""
        turns = [
            index
            for index, message in enumerate(self.messages)
            if message["role"] == "assistant" and index >= self.given
        ]
        if not turns:
            return []
        template = self.tokenizer.get_chat_template(tools=self.settings["tools"])
        if _MARKERS.search(template) and self.tokenizer.is_fast:
            return [self._by_markers()]
        whole = self._render(self.messages)
        ends = {index: self._turn(index) for index in turns}
        if all(whole.startswith(after) for after, _, _ in ends.values()):
            spans = [span for _, span, _ in ends.values()]
            odd = any(mismatch for _, _, mismatch in ends.values())
            return [self._tokenize(whole, spans, odd)]
        return [self._tokenize(after, [span], odd) for after, span, odd in ends.values()]

    def _turn(self, index: int) -> tuple[str, Span, bool]:
        """The text up to and with an assistant turn, the turn's span in it, any mismatch."""
        after = self._render(self.messages[: index + 1])
        if index == 0:
            raise RequestError(
                f"{self.where}: begins with an assistant turn, so the chat template cannot show "
                "where the answer starts; put the user's turn before it"
            )
        history = self._render(self.messages[:index])
        before = self._render(self.messages[:index], add_generation_prompt=True)
        if not after.startswith(history):
            raise RequestError(
                f"{self.where}: the chat template of {self._name} changes the turns before an "
                f"assistant turn when it is added (message {index}), so the prompt that is "
                "trained would not be the prompt at inference; use a template that keeps them, "
                "or one with {% generation %} markers"
            )
        start = _common(before, after)
        return after, (start, len(after)), start < len(before)

    def _by_markers(self) -> Rendered:
        """Trust the template's ``{% generation %}`` markers; the prompt's turns are cleared."""
        encoded = self._apply(
            self.messages,
            return_assistant_tokens_mask=True,
            return_dict=True,
            tokenizer_kwargs={"return_offsets_mapping": True, "verbose": False},
        )
        mask = [bool(bit) for bit in encoded["assistant_masks"]]
        if self.given:
            prompt = self._render(self.messages[: self.given])
            start = _common(prompt, self._render(self.messages))
            ends = (end for _, end in encoded["offset_mapping"])
            mask = [bit and end > start for bit, end in zip(mask, ends, strict=True)]
        return Rendered(list(encoded["input_ids"]), mask)

    def _tokenize(self, text: str, spans: Sequence[Span], mismatch: bool) -> Rendered:
        """Tokenize a rendered conversation once; mark the tokens that touch a span."""
        if not self.tokenizer.is_fast:
            return self._tokenize_without_offsets(text, spans, mismatch)
        encoded = self.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        mask = []
        reached = 0
        for start, end in encoded["offset_mapping"]:
            # Byte-level tokenizers report a token of spaces as empty: it covers what was skipped.
            low, high = (start, end) if end > start else (reached, max(end, reached + 1))
            mask.append(any(low < stop and high > begin for begin, stop in spans))
            reached = max(reached, end)
        return Rendered(list(encoded["input_ids"]), mask, mismatch)

    def _tokenize_without_offsets(
        self, text: str, spans: Sequence[Span], mismatch: bool
    ) -> Rendered:
        """For slow tokenizers: a span's tokens lie between where its two ends are reached."""

        def ids_of(part: str) -> list[int]:
            return list(self.tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"])

        ids = ids_of(text)
        mask = [False] * len(ids)
        for begin, stop in spans:
            first, last = _common(ids_of(text[:begin]), ids), _common(ids_of(text[:stop]), ids)
            mask[first:last] = [True] * (last - first)
        return Rendered(ids, mask, mismatch)

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        text = self._apply(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
        assert isinstance(text, str)
        return text

    def _apply(self, messages: Sequence[Message], **options: Any) -> Any:
        from jinja2 import TemplateError, TemplateSyntaxError

        try:
            return self.tokenizer.apply_chat_template(list(messages), **options, **self.settings)
        except TemplateSyntaxError as error:
            raise RequestError(
                f"{self.where}: the chat template of {self._name} is not a Jinja template (line "
                f"{error.lineno}: {error}); mend it, or give another as model.chat_template"
            ) from error
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise RequestError(
                f"{self.where}: the chat template of {self._name} refuses this conversation "
                f"({error}); give the turns in the order and roles the template asks for"
            ) from error

    @property
    def _name(self) -> str:
        return self.tokenizer.name_or_path or type(self.tokenizer).__name__


def _common(one: Sequence[object], other: Sequence[object]) -> int:
    """Length of the longest common beginning."""
    for index, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return index
    return min(len(one), len(other))
