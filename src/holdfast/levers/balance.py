"""Balance: several lessons in one run, each a fixed part of every step.

Source: Raffel et al. 2020 (T5, section 3.5.2): examples-proportional, equal or chosen mixing.
Equation: loss of the lesson = sum_t p_t * mean NLL of tag t, p_t its share of the response tokens.
With c_t the tokens of tag t for each of its response tokens, that is the plain mean over a step
whose tokens are shared out by p_t c_t / sum_u p_u c_u: so a tag with long prompts is not drowned,
and nothing of the loss is changed.
Acts on: the mixture.
Estimator: a tag's share of all tokens is exact to within one row over the whole run, its share of
response tokens over an epoch of its rows.
Cost: none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from holdfast.data.example import Example, Role
from holdfast.errors import RequestError, did_you_mean
from holdfast.levers import Lever

if TYPE_CHECKING:
    from datasets import Dataset

    from holdfast.data.mixture import Stream

Weight = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]


class Balance(Lever):
    """The lesson's tags in proportion. A tag is the `domain` of a row, or else of its source."""

    OFF: ClassVar = {"shares": "off"}

    shares: Literal["off", "tokens", "equal"] | dict[str, Weight] = "off"
    """Share of the lesson's response tokens that each tag has. off: the lesson is one. tokens: as
    many as its rows hold. equal: the same for each. Or by tag, relative to one another:
    {math: 2, code: 1}; a smaller tag is then read more often."""

    @property
    def off(self) -> bool:
        """True where the lesson is one."""
        return self.shares == "off"

    def lesson(self, rows: Sequence[Example] | Dataset, share: float) -> Sequence[Stream]:
        """One stream a tag.

        Raises:
            RequestError: a row has no tag, or tags and shares do not match.
        """
        if self.off:
            return ()
        from holdfast.data.stream import Stream, column, learned, some_of

        tags = column(rows, "domain")
        if None in tags:
            raise RequestError(
                f"levers.balance: {tags.count(None):,} rows of the lesson have no tag; give each "
                "of data.sources a domain, such as {path: math.jsonl, domain: math}"
            )
        parts = {
            tag: some_of(rows, [i for i, other in enumerate(tags) if other == tag])
            for tag in sorted(set(tags))
        }
        streams = {
            tag: Stream.of(f"task/{tag}", Role.TASK, share, part) for tag, part in parts.items()
        }
        responses = {tag: learned(part) for tag, part in parts.items()}
        weights = {
            tag: weight * streams[tag].tokens / responses[tag]
            for tag, weight in self._weights(responses).items()
        }
        total = sum(weights.values())
        return [
            Stream.of(f"task/{tag}", Role.TASK, share * weights[tag] / total, part)
            for tag, part in parts.items()
        ]

    def _weights(self, responses: dict[str, int]) -> dict[str, float]:
        """What each tag's share of the response tokens is in proportion to."""
        if self.shares == "tokens":
            return dict(responses)
        if not isinstance(self.shares, dict):
            return dict.fromkeys(responses, 1.0)
        for tag in self.shares.keys() - responses.keys():
            hint = did_you_mean(tag, responses)
            raise RequestError(f"levers.balance.shares: no row of the lesson is '{tag}'; {hint}")
        if missing := sorted(responses.keys() - self.shares.keys()):
            raise RequestError(
                f"levers.balance.shares: no share for {', '.join(missing)}; give each tag one, "
                f"such as {missing[0]}: 1.0"
            )
        return self.shares
