"""Results on disk: a base is scored once for ever.

One JSON file a probe, named by a hash of all that decides the result: weights, configuration,
adapters and their state, tokenizer, end tokens, items, kind of device. A file that is damaged, or
was written by another version, is as good as none: the probe is read again and the file replaced.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast import model as models
from holdfast.data.fingerprint import of_tokenizer
from holdfast.errors import HoldfastError
from holdfast.files import cache_folder, write_text
from holdfast.meters.probes.items import Item

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VERSION = 2
"""Raise it when the same model and items would give other results."""


@dataclass(frozen=True)
class Outcome:
    """What came of each item, in order."""

    values: list[float]
    answers: list[str] | None
    """What the model answered, where it does."""


def default_folder() -> Path:
    """`$HOLDFAST_CACHE/probes`, else that of the user's cache folder."""
    return cache_folder() / "probes"


class Results:
    """Results of one model, as it now is."""

    def __init__(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path | None = None
    ) -> None:
        """Hashes the weights once: make it anew after they have changed."""
        from holdfast.decode import end_tokens

        self.folder = folder or default_folder()
        ends = end_tokens(models.causal_lm(model), tokenizer)
        self._base = _digest([VERSION, _of_model(model), of_tokenizer(tokenizer), ends])

    def find(self, items: Sequence[Item]) -> Outcome | None:
        """What was stored for these items, if it is sound."""
        try:
            record = json.loads(self._path(items).read_text(encoding="utf-8"))
            outcome, checksum = record["outcome"], record["sha256"]
            values, answers = outcome["values"], outcome["answers"]
            sound = (
                _digest(outcome) == checksum
                and len(values) == len(items)
                and all(isinstance(v, float) and math.isfinite(v) for v in values)
                and (answers is None or len(answers) == len(items))
            )
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return Outcome(values, answers) if sound else None

    def store(self, items: Sequence[Item], outcome: Outcome) -> None:
        """Write it whole or not at all; where the folder cannot be written, it is read anew."""
        plain = {"values": outcome.values, "answers": outcome.answers}
        text = json.dumps({"outcome": plain, "sha256": _digest(plain)}) + "\n"
        with suppress(OSError, HoldfastError):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(self._path(items), text)

    def _path(self, items: Sequence[Item]) -> Path:
        name = _digest([self._base, [item.model_dump(mode="json") for item in items]])
        return self.folder / f"{name}.json"


def _of_model(model: Any) -> list[Any]:
    lm = models.causal_lm(model)
    # an adapter that is off, merged or scaled otherwise changes no weight, but the answers
    states = ("active_adapters", "scaling", "disable_adapters", "merged")
    adapters = [
        [name, *(str(getattr(module, state, None)) for state in states)]
        for name, module in lm.named_modules()
        if hasattr(module, "disable_adapters") and hasattr(module, "base_layer")
    ]
    return [models.hash_weights(lm), lm.device.type, models.plain_config(lm), adapters]


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
