"""A checkpoint that some tool made, as the command line names it: loaded, and of which base."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from holdfast import model as models
from holdfast.errors import RequestError
from holdfast.lineage import Stage, locate
from holdfast.measure import LONGEST, context_length

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Dtype = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory."""

    named: str
    """What the command line calls it: MODEL, BASE, TUNED."""
    stage: Stage
    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel

    @property
    def context(self) -> int:
        """Tokens of the longest window it is read with."""
        return min(context_length(self.model.config, self.tokenizer), LONGEST)


def load_checkpoint(named: str, path: str, tokenizer: str | None, dtype: Dtype) -> Checkpoint:
    """Load a model folder, adapter, run folder or hub id, on the device that reads.

    Raises:
        RequestError: it cannot be loaded; in the words of the command line.
    """
    import torch

    settings = models.Model(path=path, tokenizer=tokenizer, dtype=dtype)
    try:
        models.check_folder(settings)
        theirs = models.load_tokenizer(settings)
        model = models.load_model(settings, adapter=True, tokenizer=theirs)
    except RequestError as error:
        raise RequestError(*(_said(line, named) for line in error.problems)) from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Checkpoint(named, locate(path), theirs, model.to(device).eval())


def _said(line: str, named: str) -> str:
    """A problem of a recipe's field in the words of the command line."""
    for field_name, word in (
        ("model.tokenizer", "--tokenizer"),
        ("model.dtype:", "--dtype"),
        ("model.path:", named),
    ):
        line = line.replace(field_name, word)
    return line


def require_made_for(base: Checkpoint, tuned: str, dtype: Dtype) -> None:
    """Refuse an adapter whose own base has other weights than the one it is compared with."""
    try:
        stage = locate(tuned, field="TUNED")
    except RequestError as error:
        raise RequestError(*(_said(line, "TUNED") for line in error.problems)) from error
    ours = base.stage
    started_here = stage.adapters[: len(ours.adapters)] == ours.adapters
    if not stage.adapters or (_place(stage.model) == _place(ours.model) and started_here):
        return
    own = load_checkpoint("TUNED", stage.model, stage.tokenizer, dtype).model
    if models.hash_weights(own) != models.hash_weights(base.model):
        raise RequestError(
            f"TUNED '{tuned}' is an adapter made for '{stage.model}', which has other weights than "
            f"BASE; compare it with its own base: holdfast compare {stage.model} {tuned}"
        )


def _place(path: str) -> str:
    folder = Path(path).expanduser()
    return str(folder.resolve()) if folder.exists() else path
