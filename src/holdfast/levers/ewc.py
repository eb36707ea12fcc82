"""EWC: hold weights near their start, harder where the base's own text was sensitive to them.

Source: Kirkpatrick et al. 2017; on an adapter's product, never on its factors: arXiv 2602.17559.
Equation: weight / 2 * sum_i F_i (W_i - W0_i)^2; under LoRA W - W0 = s (B A - B0 A0).
Acts on: loss.
Estimator: diagonal of the Fisher at the start of this stage, from the gradient of each row's
log-likelihood; labels sampled from the model, or the rows' own (`fisher.py`). In nats a token, so
that the sum is to second order the KL to the base, and `weight` reads as `kl_anchor`'s does.
Cost: once, a forward and a backward pass over the rows. In memory F, fp32, the size of the matrices
that move (factored: under 1 % of that), and one more copy of what is trained. In each micro-batch a
diagonal F under LoRA forms each product, a matrix at a time: 6 r in out multiplications; a factored
one needs no product.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, PrivateAttr

from holdfast.data.example import Example
from holdfast.data.rows import Source
from holdfast.errors import RequestError
from holdfast.levers import Lever, Memory, Setup, StepState, Term, TokenLosses

if TYPE_CHECKING:
    from holdfast.data.mixture import Stream
    from holdfast.displacement import Moved
    from holdfast.fisher import Importance

SEED_OFFSET = 2_000_003
"""Rows are sampled with another seed than anchor rows and canary text."""


class Ewc(Lever):
    """A pull back to the start of this stage, weighed by the Fisher. Off unless asked for."""

    OFF: ClassVar = {"weight": 0.0}
    reads_losses: ClassVar = False

    weight: float = Field(default=0.0, ge=0.0)
    """Weight of half the quadratic form (about the KL to the base, nats a token) beside the
    lesson's mean loss. 0 turns it off."""
    fisher: Literal["diagonal", "factored"] = "diagonal"
    """diagonal: a number for each weight. factored: means over rows and columns of each matrix, for
    sizes where a second model does not fit."""
    labels: Literal["sampled", "empirical"] = "sampled"
    """Whose gradient is squared. sampled: tokens drawn from the model at each position, which is
    the Fisher. empirical: the rows' own tokens."""
    sources: list[Source] = Field(default_factory=list)
    """Files with rows of the base's kind; empty: rows that the base writes itself."""
    rows: int = Field(default=256, ge=1)
    """Rows that the Fisher is taken over; of `sources` a random choice of as many."""
    max_new_tokens: int = Field(default=256, ge=1)
    """Tokens of a row that the base writes; fewer where it ends or `max_length` cuts."""
    _rows: list[Example] = PrivateAttr(default_factory=list)
    _base: str = PrivateAttr(default="")
    _moved: dict[str, Moved] = PrivateAttr(default_factory=dict)
    _fisher: dict[str, Importance] = PrivateAttr(default_factory=dict)

    def streams(self, setup: Setup) -> Sequence[Stream]:
        """Collect the rows while the base is bare; they are no stream, for they are not trained."""
        if self.weight == 0 or setup.model.device.type == "meta":  # a plan has no weights
            return ()
        from holdfast.model import hash_weights

        self._base = hash_weights(setup.model)
        self._rows = self._read(setup) if self.sources else self._written(setup)
        return ()

    def prepare(self, setup: Setup) -> None:
        """Compute the Fisher, or read it back from the run folder; remember the start.

        Raises:
            RequestError: an adapter's change is no matrix, or no row has a token to score.
        """
        if self.weight == 0:
            return
        from holdfast import fisher
        from holdfast.displacement import moved

        self._moved = moved(setup.model, "levers.ewc")
        weights = {name: change.weight for name, change in self._moved.items()}
        rows = [(row.input_ids, row.loss_mask) for row in self._rows]
        settings = {
            "base": self._base,
            "rows": hashlib.sha256(json.dumps(rows).encode()).hexdigest(),
            "seed": setup.seed,
            "weights": sorted(weights),
            **self.model_dump(mode="json", include={"fisher", "labels"}),
        }
        self._fisher = fisher.kept(
            setup.folder / "fisher.safetensors",
            settings,
            setup.model.device,
            lambda: fisher.fisher(
                setup.model,
                self._rows,
                weights,
                labels=self.labels,
                factored=self.fisher == "factored",
                seed=setup.seed + SEED_OFFSET,
            ),
        )
        setup.notes["ewc"] = {
            "rows": len(rows),
            "tokens": sum(sum(mask[1:]) for _, mask in rows),
            "fisher_bytes": fisher.size(self._fisher),
        }

    def terms(self, out: TokenLosses, state: StepState, memory: Memory) -> dict[str, Term]:
        """Weight * half the quadratic form, once a step: each micro-batch adds its part."""
        if self.weight == 0:
            return {}
        import torch

        parts = [change.quadratic(self._fisher[name]) for name, change in self._moved.items()]
        return {"ewc": Term(0.5 * torch.stack(parts).sum(), state.micro_batches, self.weight)}

    def _written(self, setup: Setup) -> list[Example]:
        from holdfast.data.self_generated import generate

        notes: dict[str, str] = {}
        rows = generate(
            setup.model,
            setup.tokenizer,
            rows=self.rows,
            max_new_tokens=min(self.max_new_tokens, setup.max_length - 1),
            temperature=1.0,
            seed=setup.seed + SEED_OFFSET,
            keep=setup.folder / "fisher_rows.json",
            notes=notes,
        )
        setup.notes |= notes
        return rows

    def _read(self, setup: Setup) -> list[Example]:
        import numpy as np

        from holdfast.data.chat import encode_all, fingerprint
        from holdfast.data.rows import iter_rows

        found, _ = encode_all(
            (row for source in self.sources for row in iter_rows(source)),
            setup.tokenizer,
            max_length=setup.max_length,
            cache_dir=setup.folder,
            fingerprint=fingerprint(self.sources, setup.tokenizer, setup.max_length),
        )
        if not len(found):
            raise RequestError(
                f"levers.ewc.sources: '{self.sources[0].path}' has no row with a token to score; "
                "give text rows, or leave sources out for rows that the base writes"
            )
        random = np.random.default_rng(np.random.SeedSequence([setup.seed, SEED_OFFSET]))
        chosen = sorted(random.permutation(len(found))[: self.rows].tolist())
        rows = map(found.__getitem__, chosen)
        return [Example(row["input_ids"], row["loss_mask"]) for row in rows]
