"""What a run will cost: parameters, memory, tokens and steps, without a weight being loaded.

Memory of one device in bytes, an estimate that is sooner too high than too low. P parameters are
held in p bytes each, T of them are trained and held in t bytes; N = `train.micro_batch_tokens`,
W = the longest row:

    weights      P p
    casts        2 P            where fp32 weights compute in bfloat16: what autocast keeps of them
    reference    P p            where the base is a second copy, not the adapter switched off
    gradients    T t
    optimizer    2 T t          AdamW: two moments, held as the weights are
    activations  N L (8 H + a (4 Q + 3 I + W)) + N X + N (4 + 2 a) H
    logits       3 C, with a KL term 6 C: fp32 chunks alive at once; C = min(CHUNK_BYTES, 4 N V)

Weights, gradients and moments are counted as by Rajbhandari et al. 2020 (ZeRO, section 3.1).
Activations are what autograd keeps of a llama-like layer, counted as by Korthikanti et al. 2022
(section 4.1): a bytes each (2 on an accelerator, under bfloat16), for L layers of hidden size H,
Q = heads x head size and MLP size I (with experts, of those that a token visits). These are the
inputs of both norms in fp32; queries, keys and values (repeated to Q) and the attention's output;
gate, up and the activated gate; a row of the attention mask. X are the inputs of the trained
matrices: L a (4 H + I) where all are trained, 4 bytes times the input sizes of the adapted ones
where they are adapters; the last term is the final norm's. Activation checkpointing keeps a H a
layer, and one layer whole.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from holdfast import model as models
from holdfast.data.example import Example, Role
from holdfast.data.stream import Stream
from holdfast.errors import RequestError
from holdfast.levers import Setup
from holdfast.levers.kl_anchor import KlAnchor
from holdfast.objective import CHUNK_BYTES
from holdfast.prepare import Prepared, load, prepare
from holdfast.recipe import Recipe

if TYPE_CHECKING:
    from rich.table import Table
    from torch import Tensor
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class StreamPlan:
    """What the run takes from one stream."""

    name: str
    share: float
    """Fraction of each step's tokens."""
    tokens: int
    rows: int | None
    """None for text that the base has yet to write."""
    epochs: float | None
    """Times the stream is gone through."""


@dataclass(frozen=True)
class Plan:
    """What a run will cost."""

    parameters: int
    trainable: int
    steps: int
    batch_tokens: int
    """Tokens of one step, over all devices."""
    max_length: int
    """Longest row in tokens."""
    micro_batches: int
    """Forward passes of one step, over all devices."""
    streams: tuple[StreamPlan, ...]
    memory: dict[str, int]
    """Bytes by part; see the formula above."""

    @property
    def total_memory(self) -> int:
        """Bytes of all parts."""
        return sum(self.memory.values())

    def as_dict(self) -> dict[str, Any]:
        """The plan as plain values."""
        return {**asdict(self), "total_memory": self.total_memory}

    def table(self) -> Table:
        """The plan for the terminal."""
        from rich.table import Table

        table = Table("part", "what it takes", show_header=False)
        table.add_row("parameters", f"{self.parameters:,}")
        table.add_row("trained", f"{self.trainable:,} ({self.trainable / self.parameters:.2%})")
        table.add_row("steps", f"{self.steps:,}")
        passes = "1 pass" if self.micro_batches == 1 else f"{self.micro_batches} passes"
        table.add_row("one step", f"{self.batch_tokens:,} tokens in {passes}")
        table.add_row("longest row", f"{self.max_length:,} tokens", end_section=True)
        for stream in self.streams:
            table.add_row(stream.name, _stream_line(stream))
        table.add_section()
        for part, size in self.memory.items():
            table.add_row(part, _size(size))
        table.add_row("memory", f"about {_size(self.total_memory)}", style="bold")
        return table


def plan(recipe: Recipe, console: Console | None = None) -> Plan:
    """What the recipe's run will cost. Tokenizes the rows, in a folder that is then deleted.

    Raises:
        RequestError: the model, its tokenizer or the data cannot be used.
    """
    with tempfile.TemporaryDirectory() as folder:
        prepared = sketch(recipe, Path(folder), console or Console(quiet=True))
        model = prepared.setup.model
        for lever in recipe.levers.active():
            model = lever.wrap(model)
        return Plan(
            parameters=sum(p.numel() for p in model.parameters()),
            trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
            steps=prepared.steps,
            batch_tokens=prepared.mixture.batch_tokens,
            max_length=prepared.setup.max_length,
            micro_batches=prepared.mixture.micro_batches,
            streams=tuple(_streams(prepared)),
            memory=memory(recipe, model, prepared.setup.max_length),
        )


def sketch(recipe: Recipe, folder: Path, console: Console) -> Prepared:
    """What `prepare` makes, but no weight is loaded, and the self-generated rows stay blank.

    Lesson and replay rows are those of the run, step by step.
    """
    tokenizer = models.load_tokenizer(recipe.model)
    anchor = _Blank.model_construct(**dict(recipe.levers.kl_anchor))
    levers = recipe.levers.model_copy(update={"kl_anchor": anchor})
    blank = recipe.model_copy(update={"levers": levers})
    prepared = prepare(blank, tokenizer, skeleton(recipe), folder, console)
    return replace(prepared, recipe=recipe)


def generated(recipe: Recipe, folder: Path, console: Console) -> Prepared:
    """What `prepare` makes, the base's own text included."""
    return prepare(recipe, *load(recipe, console), folder, console)


BLANK = "self_generated"
"""The stream whose text is not written in a sketch."""


class _Blank(KlAnchor):
    """The anchor with a stream of the right share, whose rows are not written."""

    def streams(self, setup: Setup) -> Sequence[Stream]:
        share = self.self_generated.fraction
        if self.weight == 0 or self.on == "task" or share == 0:
            return ()
        length = min(self.self_generated.max_new_tokens, setup.max_length - 1)
        row = Example([0] * length, [False] + [True] * (length - 1))
        return (Stream.of(BLANK, Role.ANCHOR, share, [row]),)


def skeleton(recipe: Recipe) -> PreTrainedModel:
    """The base without its weights: the shapes that its config asks for, on the meta device."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = recipe.model
    models.check_folder(settings)
    try:
        config = AutoConfig.from_pretrained(
            settings.path,
            revision=settings.revision,
            trust_remote_code=settings.trust_remote_code,
        )
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config,
                dtype=models.dtype_of(settings, adapter=not recipe.levers.adapter.off),
                trust_remote_code=settings.trust_remote_code,
            )
    except (ImportError, OSError, ValueError, KeyError) as error:
        raise RequestError(
            f"model.path: '{settings.path}' cannot be planned for: {error}; give a causal "
            "language model that transformers knows"
        ) from error
    return model


def memory(recipe: Recipe, model: Any, max_length: int) -> dict[str, int]:
    """Bytes on one device, by part; `model` has its adapter, if any. See the formula above."""
    import torch

    anchor = recipe.levers.kl_anchor
    held = sum(_bytes(p) for p in model.parameters())
    trained = sum(_bytes(p) for p in model.parameters() if p.requires_grad)
    adapter = hasattr(model, "disable_adapter")
    copied = anchor.weight > 0 and not (
        anchor.reference == "adapter_off" or (anchor.reference == "auto" and adapter)
    )
    tokens = recipe.train.micro_batch_tokens
    width = 2 if torch.cuda.is_available() else model.get_input_embeddings().weight.element_size()
    vocabulary = model.get_input_embeddings().weight.shape[0]
    chunk = min(CHUNK_BYTES, 4 * tokens * vocabulary)
    return {
        "weights": held,
        "casts": sum(width * p.numel() for p in model.parameters() if p.element_size() > width),
        "reference": held if copied else 0,
        "gradients": trained,
        "optimizer": 2 * trained,
        "activations": tokens
        * _activations(model, width, max_length, recipe.train.activation_checkpointing),
        "logits": (6 if anchor.weight else 3) * chunk,
    }


def _activations(model: Any, width: int, row: int, checkpointed: bool) -> int:
    """Bytes a token that autograd keeps, over all layers."""
    config = model.config.get_text_config()
    H, L, heads = config.hidden_size, config.num_hidden_layers, config.num_attention_heads
    Q = heads * (getattr(config, "head_dim", None) or H // heads)
    I = _mlp_size(config, H)  # noqa: E741
    adapted = [m for m in model.modules() if hasattr(m, "get_base_layer")]
    inputs = sum(4 * getattr(module, "in_features", H) for module in adapted)  # of all layers
    every = inputs if adapted else L * width * (4 * H + I)
    layers = L * (8 * H + width * (4 * Q + 3 * I + row)) + every
    kept = L * width * H + layers // L if checkpointed else layers
    return int(kept + (4 + 2 * width) * H)


def _mlp_size(config: Any, hidden: int) -> int:
    """Width of what one token computes in an MLP, over the experts that it visits."""
    size: int = getattr(config, "intermediate_size", None) or 4 * hidden
    visited: int = getattr(config, "num_experts_per_tok", None) or 0
    return visited * (getattr(config, "moe_intermediate_size", None) or size) or size


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _streams(prepared: Prepared) -> Iterator[StreamPlan]:
    for stream in prepared.streams:
        taken = prepared.mixture.token_budget(prepared.steps)[stream.name]
        known = stream.name != BLANK
        yield StreamPlan(
            stream.name,
            stream.share,
            taken["tokens"],
            taken["rows"] if known else None,
            taken["epochs"] if known else None,
        )


def _stream_line(stream: StreamPlan) -> str:
    line = f"{stream.tokens:,} tokens, {stream.share:.0%} of each step"
    if stream.rows is None or stream.epochs is None:
        return f"{line}; written by the base before training"
    return f"{line}; {stream.rows:,} rows, {stream.epochs:.2f} times each"


def _size(size: int) -> str:
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 // 10 else f"{size / 2**20:,.1f} MiB"
