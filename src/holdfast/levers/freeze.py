"""Freeze: leave parts of the model as they are.

Source: Howard & Ruder 2018 (ULMFiT) for the first layers; routers: Zoph et al. 2022 (ST-MoE) tune
subsets of a mixture of experts, and narrow rows overwrite what routing sends to them.
Acts on: the trainable part. A frozen matrix gets no adapter either.
Cost: none; less memory for gradients and optimizer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from holdfast.errors import RequestError, did_you_mean
from holdfast.levers import Lever

if TYPE_CHECKING:
    from torch.nn import Module
    from transformers import PreTrainedModel

ROUTER = re.compile(r"(^|\.)(gate|router|shared_expert_gate)(\.|$)")
"""Names of the modules that send a token to its experts."""
Preset = Literal["embeddings", "head", "norms", "router"]


class Freeze(Lever):
    """Which weights stay as they are. Nothing unless asked for."""

    OFF: ClassVar = {}

    presets: list[Preset] = Field(default_factory=list)
    """embeddings (of tokens and positions; with tied weights the head as well), head, norms, and
    the router of a mixture of experts. An empty list turns it off."""
    first_blocks: int = Field(default=0, ge=0)
    """Blocks (attention and MLP) that stay, counted from the input. 0 turns it off."""
    patterns: list[str] = Field(default_factory=list)
    """Names of weights with * and ?, as `model.named_parameters()` lists them, such as
    "*.self_attn.*". An empty list turns it off."""

    def wrap(self, model: PreTrainedModel) -> PreTrainedModel:
        """Freeze. Raises RequestError where there is nothing of what is asked for."""
        for preset in self.presets:
            found = [p for m in PRESETS[preset](model) for p in m.parameters()]
            if not found:
                raise RequestError(
                    f"levers.freeze.presets: {type(model).__name__} has no {preset}; take "
                    f"'{preset}' out"
                )
            _hold(found)
        if self.first_blocks:
            blocks = _blocks(model)
            if self.first_blocks > len(blocks):
                raise RequestError(
                    f"levers.freeze.first_blocks: {self.first_blocks} is more than the "
                    f"{len(blocks)} blocks of {type(model).__name__}; a value that works: "
                    f"{len(blocks) // 2}"
                )
            for block in blocks[: self.first_blocks]:
                _hold(block.parameters())
        for pattern in self.patterns:
            _freeze_named(model, pattern)
        return model


def _freeze_named(model: PreTrainedModel, pattern: str) -> None:
    weights = dict(model.named_parameters(remove_duplicate=False))
    found = [p for name, p in weights.items() if fnmatchcase(name, pattern)]
    if not found:
        hint = did_you_mean(pattern, weights)
        if not hint.startswith("did you mean"):
            hint = f"'{next(iter(weights))}' is one; begin with * to match the end of a name"
        raise RequestError(
            f"levers.freeze.patterns: '{pattern}' matches no weight of {type(model).__name__}; "
            f"{hint}"
        )
    _hold(found)


def _hold(parameters: Iterable[Any]) -> None:
    """Marked too: a matrix in 4 bits takes no gradient anyhow, but could be given an adapter."""
    for parameter in parameters:
        parameter.requires_grad_(False)
        parameter.held = True


def _blocks(model: PreTrainedModel) -> Any:
    """The decoder's blocks: its own list of modules, the longest if there are several."""
    from torch import nn

    lists = [m for m in model.get_decoder().children() if isinstance(m, nn.ModuleList)]
    return max(lists, key=len, default=[])


def _embeddings(model: PreTrainedModel) -> Iterator[Module]:
    from torch import nn

    return (m for m in model.modules() if isinstance(m, nn.Embedding))


def _head(model: PreTrainedModel) -> Iterator[Module]:
    yield model.get_output_embeddings()


def _norms(model: PreTrainedModel) -> Iterator[Module]:
    return (m for m in model.modules() if "norm" in type(m).__name__.lower())


def _router(model: PreTrainedModel) -> Iterator[Module]:
    return (m for name, m in model.named_modules() if ROUTER.search(name))


PRESETS: dict[Preset, Callable[[PreTrainedModel], Iterator[Module]]] = {
    "embeddings": _embeddings,
    "head": _head,
    "norms": _norms,
    "router": _router,
}
