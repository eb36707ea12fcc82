"""Fine-tune language models without losing what they already know.

The public names; each is imported from its module on first use, so that `import holdfast` costs
nothing and never loads torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from holdfast.data.mixture import Mixture as Mixture
    from holdfast.data.stream import Stream as Stream
    from holdfast.errors import HoldfastError as HoldfastError
    from holdfast.errors import RequestError as RequestError
    from holdfast.gate.verdict import Gate as Gate
    from holdfast.gate.verdict import decide as decide
    from holdfast.guard import Guard as Guard
    from holdfast.levers import Lever as Lever
    from holdfast.levers import Term as Term
    from holdfast.meters import Reading as Reading
    from holdfast.recipe import Recipe as Recipe
    from holdfast.recipe import load_recipe as load_recipe
    from holdfast.run import train as train
    from holdfast.trainer import HoldfastTrainer as HoldfastTrainer

_HOME = {
    "Gate": "gate.verdict",
    "Guard": "guard",
    "HoldfastError": "errors",
    "HoldfastTrainer": "trainer",
    "Lever": "levers",
    "Mixture": "data.mixture",
    "Reading": "meters",
    "Recipe": "recipe",
    "RequestError": "errors",
    "Stream": "data.stream",
    "Term": "levers",
    "decide": "gate.verdict",
    "load_recipe": "recipe",
    "train": "run",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'holdfast' has no attribute '{name}'")
    return getattr(import_module(f"holdfast.{_HOME[name]}"), name)
