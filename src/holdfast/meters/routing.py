"""Routing: which experts each token of some documents is sent to, by layer.

Routers are found by what transformers declares for `output_router_logits`; what counts is what they
chose: the integers that a router gives beside its logits, or, where it gives none, its top-k.

Shape suffixes: N tokens of a document, K experts of a token, E experts of a layer, G documents.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from holdfast import model as models
from holdfast.errors import RequestError
from holdfast.meters import Split
from holdfast.meters.batches import batches
from holdfast.meters.canary import Document

if TYPE_CHECKING:
    import torch

Counts = NDArray[np.float64]


class Routers(NamedTuple):
    """The routers of a model, in the order of its layers."""

    modules: dict[str, Any]
    logits_at: dict[str, int]
    """Where in a router's output its logits stand, if that is a tuple."""
    top_k: int
    """Experts of a token, for routers that do not say themselves which they chose."""


def routers(model: Any) -> Routers | None:
    """Those of a mixture of experts; None for a model without."""
    lm = models.causal_lm(model)
    wanted: dict[type, int] = {}
    for module in lm.modules():
        declared = getattr(module, "_can_record_outputs", None) or {}
        recorders = declared.get("router_logits", [])
        for recorder in recorders if isinstance(recorders, list) else [recorders]:
            made_by: Any = getattr(recorder, "target_class", recorder)
            wanted[made_by] = getattr(recorder, "index", 0)
    found = {name: module for name, module in lm.named_modules() if type(module) in wanted}
    if not found:
        return None
    config = lm.config.get_text_config()
    top_k = next(
        (k for k in (getattr(config, n, None) for n in ("num_experts_per_tok", "top_k")) if k), 1
    )
    names = {name: layer_of(name) for name in found}
    return Routers(
        {names[name]: module for name, module in found.items()},
        {names[name]: wanted[type(module)] for name, module in found.items()},
        top_k,
    )


def layer_of(name: str) -> str:
    """What the module or parameter of this name belongs to, by its name in the bare model."""
    return name.removeprefix("base_model.model.").replace(".base_layer", "").rpartition(".")[0]


@dataclass(frozen=True)
class Routing:
    """Which experts each token of some documents was sent to."""

    documents: tuple[Document, ...]
    layers: tuple[str, ...]
    experts: tuple[int, ...]
    """How many each layer has."""
    chosen: tuple[tuple[NDArray[np.int16], ...], ...]
    """By document and layer (N, K), each token's experts in rising order."""
    seconds: float

    def shares(self, domain: str | None = None) -> dict[str, Counts]:
        """Share of the routed slots of each expert (E,), by layer; of one domain or of all."""
        return {
            layer: (c := self.counts(number, domain).sum(0)) / max(1.0, c.sum())
            for number, layer in enumerate(self.layers)
        }

    def pairs(self, domain: str | None = None) -> dict[str, Counts]:
        """Share of pairs of experts that met in a token, by layer: (E, E), upper triangle."""
        found = {}
        for number, layer in enumerate(self.layers):
            experts = self.experts[number]
            counts = self.pair_counts(number, domain).sum(0)
            found[layer] = (counts / max(1.0, counts.sum())).reshape(experts, experts)
        return found

    def counts(self, layer: int, domain: str | None = None) -> Counts:
        """Slots of each document that went to each expert: (G, E)."""
        return self._binned(layer, domain, lambda chosen: chosen.ravel(), self.experts[layer])

    def pair_counts(self, layer: int, domain: str | None = None) -> Counts:
        """Pairs of experts e < f in each document's tokens, at e E + f: (G, E E)."""
        experts = self.experts[layer]

        def pairs(chosen: NDArray[np.int16]) -> NDArray[Any]:
            first, second = np.triu_indices(chosen.shape[1], k=1)
            return (chosen[:, first].astype(np.int64) * experts + chosen[:, second]).ravel()

        return self._binned(layer, domain, pairs, experts * experts)

    def _binned(self, layer: int, domain: str | None, what: Any, size: int) -> Counts:
        rows = [
            np.bincount(what(chosen[layer]), minlength=size)
            for document, chosen in zip(self.documents, self.chosen, strict=True)
            if domain in (None, document.domain)
        ]
        return np.array(rows, dtype=np.float64).reshape(-1, size)


def read_routing(model: Any, documents: Sequence[Document], split: Split | None) -> Routing:
    """Pass the documents of a split (None: all) through the model, and note its routers' choices.

    Raises:
        RequestError: the model has no router, or its logits are not numbers.
    """
    import torch

    started = time.perf_counter()
    found = routers(model)
    if found is None:
        raise RequestError(
            f"experts: {type(models.causal_lm(model)).__name__} has no router that transformers "
            "knows; this meter is for mixtures of experts such as Mixtral, Qwen2-MoE or OLMoE"
        )
    chosen_of: dict[str, list[Any]] = defaultdict(list)
    documents = [d for d in documents if split in (None, d.split)]
    by_number: dict[int, tuple[NDArray[np.int16], ...]] = {}
    experts: dict[str, int] = {}
    training = model.training
    model.eval()
    try:
        with torch.inference_mode(), _watched(found, chosen_of, experts):
            for batch in batches([d.text for d in documents], models.causal_lm(model).device):
                chosen_of.clear()
                models.hidden_states(model, batch.ids_BW, batch.positions_BW)
                lengths = batch.real_BW.sum(1).tolist()
                for row, (number, length) in enumerate(zip(batch.numbers, lengths, strict=True)):
                    by_number[number] = tuple(
                        torch.cat(chosen_of[layer])
                        .view(*batch.ids_BW.shape, -1)[row, :length]
                        .numpy()
                        for layer in found.modules
                    )
    finally:
        model.train(training)
    return Routing(
        tuple(documents),
        tuple(found.modules),
        tuple(experts.get(layer, 0) for layer in found.modules),
        tuple(by_number[number] for number in range(len(documents))),
        time.perf_counter() - started,
    )


@contextmanager
def _watched(
    found: Routers, chosen_of: dict[str, list[Any]], experts: dict[str, int]
) -> Iterator[None]:
    import torch

    def watch(layer: str) -> Any:
        def hook(_module: Any, _put: Any, out: Any) -> None:
            parts = out if isinstance(out, tuple | list) else (out,)
            logits: torch.Tensor = parts[min(found.logits_at[layer], len(parts) - 1)]
            if logits.isnan().any():
                raise RequestError(
                    f"experts: the router of '{layer}' gives logits that are not numbers (NaN); "
                    "check the model's weights, or set model.dtype to float32"
                )
            experts[layer] = logits.shape[-1]
            whole = [p for p in parts if not p.is_floating_point() and p.dtype != torch.bool]
            # a router that does not tell: the highest logits, whatever they are turned into
            chosen = whole[-1] if whole else logits.topk(found.top_k, dim=-1).indices
            chosen = chosen.reshape(-1, chosen.shape[-1]).sort(-1).values
            chosen_of[layer].append(chosen.to("cpu", torch.int16))

        return hook

    with ExitStack() as stack:
        for layer, module in found.modules.items():
            stack.callback(module.register_forward_hook(watch(layer)).remove)
        yield
