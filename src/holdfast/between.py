"""Models between a base and what was made of it: the ways that a rewind may go back.

    adapter      W0 + s (W1 - W0), written as the LoRA adapter with s B in place of B
    weights      the same, written as a whole model
    blocks       W1 in some blocks of the model and W0 in the others; either is written
    checkpoints  what was saved while training, as it was saved

Position 0 of a way is the base and its last one is the tuned model. One model in memory is set
anywhere between; beside it are kept the base and a copy of the tensors that differ.
"""

from __future__ import annotations

import json
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.checkpoint import Checkpoint, Dtype, load_checkpoint
from holdfast.errors import HoldfastError, RequestError
from holdfast.files import write_text
from holdfast.levers.adapter import MOVES_BASE
from holdfast.lineage import Stage
from holdfast.meters.checkpoints import side_by_side
from holdfast.meters.drift import BLOCK

if TYPE_CHECKING:
    from torch import Tensor

FINEST = 64
"""Steps of the scale from base to tuned: what is chosen is a multiple of 1/64."""
COARSE = 8
"""Points beside the base that are read before anything is refined."""
REST = "rest"
"""What lies in no block: embeddings, the last norm, the head."""
_WRITTEN = ("*.safetensors", "*.safetensors.index.json", "adapter_config.json", "config.json",
            "generation_config.json")  # fmt: skip
_SCALED = re.compile(r"\.lora_(B|embedding_B)(\.|$)")
_FIXED = re.compile(r"\.lora_(A|embedding_A)(\.|$)")


class Way(ABC):
    """Models from position 0, the base, to `last`, the tuned one."""

    @property
    @abstractmethod
    def last(self) -> int:
        """The tuned model's position."""

    @property
    def every(self) -> int:
        """Positions between two points of the coarse grid."""
        return max(1, self.last // COARSE)

    @abstractmethod
    def name(self, position: int) -> str:
        """What a reader calls it."""

    @abstractmethod
    def model(self, position: int) -> Any:
        """The model there, good until the next call."""

    @abstractmethod
    def write(self, position: int, folder: Path) -> str:
        """Write it below `folder` as an ordinary artifact; returns "adapter" or "model"."""


@dataclass(frozen=True)
class Tensors:
    """The tuned model, to be set anywhere between the two, and the tensors that differ."""

    model: Any
    pairs: list[tuple[str, Tensor, Tensor, Tensor]]
    """(name, live, base, tuned)"""

    @classmethod
    def of(cls, base: Checkpoint, tuned: Checkpoint) -> Tensors:
        """Raises RequestError where the two are not of one architecture and vocabulary."""
        pairs = []
        live = dict(tuned.model.named_parameters())
        for name, now, then in side_by_side(tuned.model, base.model, set()):
            if not now.shape == live[name].shape == base.model.get_parameter(name).shape:
                raise RequestError(
                    f"'{name}' has other rows in TUNED than in BASE (a resized vocabulary), so "
                    "nothing lies between them; give --path checkpoints"
                )
            if not bool((now == then.to(now.device, now.dtype)).all()):
                pairs.append((name, now, then.to(now.device, now.dtype), now.clone()))
        return cls(tuned.model, pairs)

    @property
    def blocks(self) -> list[str]:
        """The blocks that differ, in the model's order."""
        return list(dict.fromkeys(block_of(name) for name, *_ in self.pairs))


def block_of(name: str) -> str:
    """`model.layers.3` of a tensor of that layer; `rest` of one in none."""
    found = BLOCK.match(name)
    return found[1] if found else REST


@dataclass(frozen=True)
class Line(Way):
    """Straight from base to tuned, or one block after the other."""

    tensors: Tensors
    tuned: Checkpoint
    adapter: Path | None = None
    """The folder of the LoRA adapter that the tuned model is; None: a whole model is written."""
    order: tuple[str, ...] = ()
    """Blocks in the order in which they take the tuned weights; none: all together, by degrees."""

    @property
    def last(self) -> int:
        """All of the blocks, or all of the scale's steps."""
        return len(self.order) or FINEST

    def name(self, position: int) -> str:
        """A share of the change, or how many blocks are tuned."""
        if not self.order:
            return f"{position / FINEST:.1%}"
        return f"{position} of {self.last} blocks"

    def ordered(self, order: Sequence[str]) -> Line:
        """The same way with other blocks."""
        return replace(self, order=tuple(order))

    def share(self, position: int, name: str) -> float:
        """How much of the change a tensor has there."""
        if not self.order:
            return position / FINEST
        return float(block_of(name) in self.order[:position])

    def model(self, position: int) -> Any:
        """The one model in memory, set to this position."""
        import torch

        with torch.no_grad():
            for name, live, then, now in self.tensors.pairs:
                live.copy_(between(then, now, self.share(position, name)))
        return self.tensors.model

    def write(self, position: int, folder: Path) -> str:
        """An adapter is loaded again, and must compute what was measured."""
        model = self.model(position)
        kind = "model" if self.adapter is None else "adapter"
        target = folder / kind
        if self.adapter is None:
            model.save_pretrained(target, safe_serialization=True)
        else:
            target.mkdir(parents=True)
            self._write_adapter(self.adapter, position, target)
        self.tuned.tokenizer.save_pretrained(target)
        if self.adapter is not None:
            self._require_same(model, target)
        return kind

    def _write_adapter(self, source: Path, position: int, target: Path) -> None:
        from safetensors.torch import load_file, save_file

        # the base's tensors, for what an adapter trains whole
        base = {name: then for name, _, then, _ in self.tensors.pairs}
        written = {}
        for key, tensor in load_file(source / "adapter_model.safetensors").items():
            name = _in_model(key)
            share = self.share(position, name)
            if _FIXED.search(key) or share == 1:
                written[key] = tensor
            elif _SCALED.search(key):
                written[key] = tensor.float() * share  # in half precision it would be rounded
            else:
                written[key] = between(base[name].cpu(), tensor, share) if name in base else tensor
        save_file(written, target / "adapter_model.safetensors", metadata={"format": "pt"})
        config = json.loads((source / "adapter_config.json").read_text(encoding="utf-8"))
        if len(self.tuned.stage.adapters) == 1:
            config["base_model_name_or_path"] = self.tuned.stage.model
            config["revision"] = self.tuned.stage.revision
        write_text(target / "adapter_config.json", json.dumps(config, indent=2) + "\n")

    def _require_same(self, model: Any, target: Path) -> None:
        """Load what was written, and hold that it computes what was measured."""
        import torch

        dtype: Dtype = "bfloat16" if model.dtype is torch.bfloat16 else "float32"
        again = load_checkpoint("OUT", str(target), None, dtype).model
        ids = torch.arange(8, device=model.device).remainder(model.config.vocab_size)[None]
        with torch.no_grad():
            ours, theirs = (
                m(input_ids=ids, use_cache=False).logits.float() for m in (model, again)
            )
        if not torch.allclose(ours, theirs, rtol=1e-2, atol=1e-2 * float(ours.abs().max())):
            raise HoldfastError(
                "the scaled adapter does not compute what was measured; nothing was written: give "
                "--path weights, which writes a whole model"
            )


@dataclass
class Checkpoints(Way):
    """What was saved while training, between the base and the tuned model."""

    base: Checkpoint
    tuned: Checkpoint
    folders: list[Path]
    dtype: Dtype = "auto"
    _at: tuple[int, Any] = (0, None)

    @property
    def last(self) -> int:
        """One beyond the last of the folders."""
        return len(self.folders) + 1

    def name(self, position: int) -> str:
        """base, checkpoint-N, tuned."""
        if position in (0, self.last):
            return "tuned" if position else "base"
        return self.folders[position - 1].name

    def model(self, position: int) -> Any:
        """Loaded when it is asked for; one at a time."""
        if position in (0, self.last):
            return self.tuned.model if position else self.base.model
        if self._at[0] != position:
            self._at = (0, None)  # let go of the one before
            self._at = (position, self._load(position).model)
        return self._at[1]

    def _load(self, position: int) -> Checkpoint:
        tokenizer = self.tuned.stage.tokenizer
        return load_checkpoint("TUNED", str(self.folders[position - 1]), tokenizer, self.dtype)

    def write(self, position: int, folder: Path) -> str:
        """The files as they were saved, without optimizer state."""
        stage = self.tuned.stage
        if position < self.last:
            source = self.folders[position - 1]
        else:
            source = stage.adapters[-1] if stage.adapters else Path(stage.model).expanduser()
        kind = "adapter" if (source / "adapter_config.json").is_file() else "model"
        target = folder / kind
        target.mkdir(parents=True)
        if source.is_dir():
            for file in (f for pattern in _WRITTEN for f in source.glob(pattern)):
                shutil.copy(file, target / file.name)
        else:  # a hub id
            self.tuned.model.save_pretrained(target, safe_serialization=True)
        self.tuned.tokenizer.save_pretrained(target)
        return kind


def saved_while_training(tuned: str) -> list[Path]:
    """Checkpoints of a run folder, below a folder, or beside and before a `checkpoint-N`; by step.

    Raises:
        RequestError: there is none.
    """
    path = Path(tuned).expanduser()
    own = re.fullmatch(r"checkpoint-(\d+)", path.name)
    places = [path / "checkpoints", path] if own is None else [path.parent]
    found: dict[int, Path] = {}
    for place in places:
        for folder in place.glob("checkpoint-*") if place.is_dir() else ():
            step = folder.name.rpartition("-")[2]
            if step.isdigit() and any(folder.glob("*.safetensors")):
                found.setdefault(int(step), folder)
    before = sorted(step for step in found if own is None or step < int(own[1]))
    if not before:
        raise RequestError(
            f"TUNED '{tuned}' has no checkpoints (no checkpoint-N with safetensors in it, or "
            "before it); give the folder that they were saved in, or --path weights"
        )
    return [found[step] for step in before]


def adapter_on(base: Checkpoint, stage: Stage) -> Path | None:
    """The one adapter that makes the tuned model of the base; None where it is not one."""
    above = stage.adapters
    if above[: len(base.stage.adapters)] == base.stage.adapters:
        above = above[len(base.stage.adapters) :]
    return above[0] if len(above) == 1 else None


def why_not_scaled(adapter: Path, model: Any) -> str:
    """Why s times an adapter is not the adapter with s B; empty where it is."""
    from safetensors import safe_open

    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    if config.get("peft_type") != "LORA":
        return f"a {config.get('peft_type')} adapter's change is not linear in a factor"
    if config.get("use_dora"):
        return "a DoRA adapter's change is not linear in a factor"
    if str(config.get("init_lora_weights")).lower().startswith(MOVES_BASE):
        return f"its initialisation ({config['init_lora_weights']}) moved the base"
    known = dict(model.named_parameters())
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        for key in file.keys():  # noqa: SIM118, no mapping
            if not (_SCALED.search(key) or _FIXED.search(key) or _in_model(key) in known):
                return f"it holds '{key}', which is neither A nor B nor a tensor of the model"
    return ""


def between(then: Tensor, now: Tensor, share: float) -> Tensor:
    """`then + share (now - then)`, in float32; either end exactly."""
    import torch

    if share in (0.0, 1.0):
        return now if share else then
    return torch.lerp(then.float(), now.float(), share).to(now.dtype)


def _in_model(key: str) -> str:
    """The model's name for a tensor of an adapter file."""
    return key.removeprefix("base_model.model.").replace(".base_layer.", ".")


def parts(line: Line) -> Iterator[tuple[str, Line]]:
    """Each block, and the way on which it goes back alone."""
    blocks = line.tensors.blocks
    for block in blocks:
        yield block, line.ordered([other for other in blocks if other != block] + [block])
