"""Two checkpoints, tensor by tensor: what one tool made of another's."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from holdfast.errors import RequestError

if TYPE_CHECKING:
    from torch import Tensor


def side_by_side(tuned: Any, base: Any, claimed: set[int]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name in the base, tuned, base) of each tensor; of a resized vocabulary what both have.

    Args:
        tuned: a model, with or without an adapter around it.
        base: the model that it was tuned from.
        claimed: ids of tuned parameters to pass over, such as an adapter's own.

    Raises:
        RequestError: a tensor has no counterpart of its shape.
    """
    before = dict(base.named_parameters())
    for own, parameter in tuned.named_parameters():
        if id(parameter) in claimed or not parameter.is_floating_point():
            continue
        if ".original_module." in own:  # what stands beside a module that is trained whole
            continue
        name = re.sub(r"\.(base_layer|modules_to_save\.[^.]+)(?=\.)", "", own)
        name = name.removeprefix("base_model.model.")
        now, then = parameter.detach(), before.get(name)
        if then is None or then.shape[1:] != now.shape[1:] or then.ndim != now.ndim:
            there = "not there" if then is None else f"{tuple(then.shape)}"
            raise RequestError(
                f"'{name}' is {tuple(now.shape)} in the tuned model and {there} in the base; give "
                "the base that it was tuned from"
            )
        then = then.detach()
        if now.shape != then.shape:
            rows = min(len(now), len(then))
            now, then = now[:rows], then[:rows]
        yield name, now, then
