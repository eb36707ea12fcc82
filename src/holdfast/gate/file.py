"""The gate file: what a release is held to, for `holdfast gate --gate FILE`.

    alpha: 0.05
    margins: {arithmetic: 3pt, canary: 1%}
    probes: [sealed.jsonl]
    canary: {sources: [wiki.jsonl]}

It is a recipe's `gate` section with the texts beside it; a recipe is taken as well.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator

from holdfast.explain import explain
from holdfast.gate.margins import Gate
from holdfast.meters.canary import Canary
from holdfast.recipe import Recipe, load_recipe, read_yaml

Items = Literal["auto", "all", "sealed"]


class GateFile(Gate):
    """Margins, level and rules as in a recipe's `gate` section, and what to read."""

    probes: list[str] = Field(default_factory=list)
    """JSONL files of items."""
    canary: Canary = Canary()
    """Held-out text; empty: samples of the base. Its sealed half is read."""
    items: Items = "auto"
    """Which items of the probes are judged. sealed: the half that falls to the sealed split by a
    hash of the cluster. auto: that half where TUNED was chosen by the other one (a run that read
    its probes while training, a rewound model), else all."""
    selection: list[str] = Field(default_factory=list)
    """Item files that something was chosen by (a checkpoint, a recipe); none of their items may be
    judged."""
    sha256: dict[str, str] = Field(default_factory=dict)
    """A file's name -> its hash, as `verdict.json` records it; a file that has changed is
    refused."""
    run_generated_code: bool = False
    """Run what the models write for code items, in a sandbox; without it they are refused."""

    @field_validator("enabled")
    @classmethod
    def _on(cls, enabled: bool) -> bool:
        if not enabled:
            raise ValueError("a gate that is turned off judges nothing; leave it out")
        return enabled

    @field_validator("probes", "selection", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("canary", mode="before")
    @classmethod
    def _canary_paths(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = [value]
        return {"sources": value} if isinstance(value, list) else value

    @classmethod
    def of_recipe(cls, recipe: Recipe, items: Items = "auto") -> GateFile:
        """What a run is held to and read with."""
        settings = recipe.gate.model_dump() | {"enabled": True}
        return cls(
            **settings,
            probes=recipe.probes,
            canary=recipe.canary,
            items=items,
            run_generated_code=recipe.train.run_generated_code,
        )


def load_gate_file(path: Path) -> GateFile:
    """Read a gate file, or the gate of a recipe. Raises RequestError with every problem."""
    settings = read_yaml(path)
    if "model" in settings or "data" in settings:
        return GateFile.of_recipe(load_recipe(path))
    try:
        return GateFile.model_validate(settings)
    except ValidationError as error:
        from holdfast.errors import RequestError

        raise RequestError(*explain(error, GateFile, where=str(path))) from error
