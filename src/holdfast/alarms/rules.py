"""The recipe's `alarms` section: which rule, how often, what is done."""

from __future__ import annotations

import shlex
from typing import Any

from pydantic import Field, field_validator, model_validator

from holdfast.gate.margins import Margin, MarginText
from holdfast.section import Section

OFF_WORDS = ("none", "off")


class Alarms(Section):
    """Alarms while training goes on. `none` turns them off."""

    enabled: bool = True
    """false: nothing is checked between the first reading and the last."""
    every: int | None = Field(default=None, ge=1)
    """Steps between checks. Empty: as few as keep the checks within `share` of the time, chosen at
    step 10 from what a check and a step took, and kept in the run folder from then on."""
    share: float = Field(default=0.05, gt=0.0, lt=1.0)
    """Part of the training time that checks may take, where `every` is empty."""
    alpha: float = Field(default=0.05, gt=0.0, lt=0.5)
    """Chance of any false alarm in the whole run, over all guardrails and checks together."""
    fall: MarginText = "1.5pt"
    """Accepted fall of an accuracy per 1000 steps, in points: of the probes, which are watched
    where their selection half is read while training (`measure_probes`). A loss is held to the
    gate's margin of its own (canary 1 %) at every step."""
    block: int = Field(default=20, ge=1)
    """Items of each guardrail that a check reads: new ones as long as there are any."""
    stop: bool = False
    """Save a checkpoint and end the run at an alarm; its verdict is then FAIL. false: go on."""
    webhook: str | None = None
    """An http(s) address that each alarm is sent to, as JSON by POST. Empty: none."""
    command: str | None = None
    """A program with its arguments that each alarm is given to, as JSON on its standard input; no
    shell reads it. Empty: none."""

    @model_validator(mode="before")
    @classmethod
    def _none_is_off(cls, value: Any) -> Any:
        word = isinstance(value, str) and value.lower() in OFF_WORDS
        return {"enabled": False} if word or value is None or value is False else value

    @field_validator("fall")
    @classmethod
    def _in_points(cls, fall: str) -> str:
        if Margin.parse(fall).unit != "pt":
            raise ValueError(f"{fall} is no fall of an accuracy; write points, such as 1.5pt")
        return fall

    @field_validator("webhook")
    @classmethod
    def _address(cls, webhook: str | None) -> str | None:
        if webhook is not None and not webhook.startswith(("http://", "https://")):
            raise ValueError("no http(s) address; give one such as https://example.org/alarms")
        return webhook

    @field_validator("command")
    @classmethod
    def _words(cls, command: str | None) -> str | None:
        try:
            sound = command is None or bool(shlex.split(command))
        except ValueError:
            sound = False
        if not sound:
            raise ValueError("no program; give one with its arguments, such as mail -s alarm me")
        return command

    @property
    def watches_accuracy(self) -> bool:
        """Whether a fall of accuracies was asked about in so many words."""
        return self.enabled and self.fall != type(self).model_fields["fall"].default

    @property
    def rate(self) -> float:
        """`fall` as a share of 1 per 1000 steps."""
        return Margin.parse(self.fall).absolute(1.0)
