"""Every reading to the trackers of `report_to`, through transformers' own callbacks.

They are called as `Trainer.log` calls them, but for the trainer's own log, which stays the losses.
A tracker ends with training; here it waits for what is read afterwards.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from copy import copy
from typing import Any

from transformers import Trainer, TrainerCallback
from transformers.integrations.integration_utils import get_reporting_integration_callbacks

from holdfast.meters import Reading

Record = Callable[[Sequence[Reading]], None]
ODD = re.compile(r"[^\w\-. /]")
"""What mlflow takes in no name."""


class Trackers(TrainerCallback):
    """What a trainer reports to. Nothing happens where it reports to nobody.

    Args:
        trainer: any transformers trainer, before it trains; this is added to its callbacks.
        before: readings to hand over when training begins, unless it is resumed.
    """

    def __init__(self, trainer: Trainer, before: Sequence[Reading] = ()) -> None:
        self.trainer, self.before = trainer, before
        self._ends: list[Callable[[], Any]] = []
        kinds = tuple(get_reporting_integration_callbacks(trainer.args.report_to))
        self.any = False
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, kinds):
                self.any = True
                self._hold(callback)
        trainer.add_callback(self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Hand over what was read before; the trackers are open by now."""
        if not state.global_step:
            self.hand(self.before)

    def hand(self, readings: Sequence[Reading]) -> None:
        """Report readings as of the step that training is at."""
        trainer, logs = self.trainer, logs_of(readings)
        if self.any and logs:
            # a copy: the trainer's own log of this step may still be due
            control = copy(trainer.control)
            trainer.callback_handler.on_log(trainer.args, trainer.state, control, logs)

    def after(self, record: Record) -> Record:
        """Keep readings with `record`, then hand them over."""

        def both(readings: Sequence[Reading]) -> None:
            record(readings)
            self.hand(readings)

        return both

    def close(self) -> None:
        """All is read: the trackers may end."""
        for end in self._ends:
            end()
        self._ends.clear()

    def _hold(self, callback: Any) -> None:
        end = callback.on_train_end

        def later(*args: Any, **kwargs: Any) -> None:
            self._ends.append(lambda: end(*args, **kwargs))

        callback.on_train_end = later


def logs_of(readings: Sequence[Reading]) -> dict[str, float]:
    """`METER/NAME[/SPLIT]` -> value, with `.../stderr` beside it where there is one."""
    logs: dict[str, float] = {}
    for r in readings:
        split = () if r.split == "train" else (r.split,)
        key = ODD.sub("_", "/".join((r.meter, r.name, *split)))
        logs[key] = r.value
        if r.stderr is not None and math.isfinite(r.stderr):
            logs[f"{key}/stderr"] = r.stderr
    return logs
