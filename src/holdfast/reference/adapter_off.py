"""The base is the tuned model with this stage's adapter switched off: no second copy of weights.

Adapters of earlier stages stay on. What is switched off is what is trained, so a model that is
stacked on an earlier stage is held to the start of this one, never to the original base.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from holdfast import model as models
from holdfast.reference import hidden_at

if TYPE_CHECKING:
    import torch

    from holdfast.objective import DenseBase

ROUNDING = 4
"""Relative change, in units of the weights' precision, that is still no change: other adapters than
LoRA (B = 0) are neutral up to rounding only, such as DoRA (a magnitude over its own norm)."""


class AdapterOff:
    """Reference for adapters that are added in this stage.

    Raises:
        ValueError: without the trained adapters the model is not what it is now, or would not stay
            so, and what the reference ought to be is thereby not at hand.
    """

    reads_rows = True

    def __init__(self, model: Any) -> None:
        self.model = model
        self._layers, trained = _switched(model)
        if not self._layers:
            raise ValueError("the model has no adapter that is trained")
        self._exact = all(_is_lora(model.peft_config[name]) for name in trained)
        self._check_neutral()

    def view(
        self, input_ids_BW: torch.Tensor, position_ids_BW: torch.Tensor, kl_BW: torch.Tensor
    ) -> DenseBase:
        """The base's hidden states at `kl_BW`, and its head."""
        from holdfast.objective import DenseBase

        with self._off():
            hidden_MH = hidden_at(self.model, input_ids_BW, position_ids_BW, kl_BW)
            # the base's own head, also where the tuned one is trained beside the adapter
            return DenseBase(hidden_MH, models.head(self.model))

    @contextmanager
    def _off(self) -> Iterator[None]:
        """The adapters of this stage off, and no dropout in those that stay on.

        peft's own `disable_adapter` would switch off all stages, and make all trainable after.
        """
        before = [(m, m._active_adapter, m._disable_adapters) for m, _ in self._layers]
        training = self.model.training
        self.model.eval()
        for module, kept in self._layers:
            if kept:
                module._active_adapter = kept
            else:
                module._disable_adapters = True
        try:
            yield
        finally:
            for module, active, disabled in before:
                module._active_adapter, module._disable_adapters = active, disabled
            self.model.train(training)

    def _check_neutral(self) -> None:
        """Hold that nothing changes when the adapters are switched off now, by trying."""
        import torch

        lm = models.causal_lm(self.model)
        ids = torch.arange(16, device=lm.device) * 7919 % lm.config.get_text_config().vocab_size
        positions, training = torch.arange(16, device=lm.device)[None], self.model.training
        with torch.no_grad():
            with self._off():
                off = models.hidden_states(self.model, ids[None], positions).float()
            self.model.eval()
            now = models.hidden_states(self.model, ids[None], positions).float()
            self.model.train(training)
        most = 0.0 if self._exact else ROUNDING * torch.finfo(lm.dtype).eps
        if not (now - off).norm() <= most * now.norm():
            raise ValueError(
                "switching the trained adapter off changes the model as it stands at the start of "
                "this stage"
            )


def _switched(model: Any) -> tuple[list[tuple[Any, list[str]]], set[str]]:
    """Each layer that an adapter of this stage acts on, with the earlier ones that stay on there.

    An adapter belongs to this stage if any of its weights is trained; their names come second.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    layers = [
        m for m in model.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)
    ]
    parts = {module: _parts(module) for module in layers}
    owners = {id(p): name for held in parts.values() for name, ps in held.items() for p in ps}
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    if layers and not trained <= owners.keys():
        raise ValueError("weights outside the adapters are trained, which no switch takes back")
    now = {owners[key] for key in trained if key in owners}
    switched = [
        (module, [name for name in module.active_adapters if name in held and name not in now])
        for module, held in parts.items()
        if now.intersection(module.active_adapters)
    ]
    return switched, now


def _is_lora(config: Any) -> bool:
    return config.peft_type == "LORA" and not config.use_dora


def _parts(module: Any) -> dict[str, list[Any]]:
    """The parameters of each adapter in this layer."""
    from operator import attrgetter

    from torch import nn

    found: dict[str, list[Any]] = {}
    for path in module.adapter_layer_names:
        held = attrgetter(path)(module) if hasattr(module, path.partition(".")[0]) else None
        for name, part in (
            held.items() if isinstance(held, nn.ModuleDict | nn.ParameterDict) else ()
        ):
            some = [part] if isinstance(part, nn.Parameter) else list(part.parameters())
            found.setdefault(name, []).extend(some)
    return found
