"""What a run will cost: parameters, memory, tokens and steps, without a weight being loaded.

Memory of one device in bytes, an estimate that is sooner too high than too low. P parameters are
held in p bytes each, T of them are trained and held in t bytes; N = `train.micro_batch_tokens`,
W = the longest row:

    weights      P p
    casts        2 P            where fp32 weights compute in bfloat16: what autocast keeps of them
    reference    P r            where the base is a second copy beside the model, r bytes each
    gradients    T t
    optimizer    2 T t          AdamW: two moments, held as the weights are
    activations  N L (8 H + a (4 Q + 3 I + W)) + N X + N (4 + 2 a) H
    logits       C, with a live base 2 C: fp32 chunks alive at once; C = 4 V min(chunk_rows, N).
                 Where the head is trained 4 V H more: a micro-batch's gradient of it

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

import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from holdfast import model as models
from holdfast.chunks import chunk_rows
from holdfast.data.example import Example, Role
from holdfast.data.stream import Stream
from holdfast.errors import RequestError
from holdfast.levers import Setup, wrapped
from holdfast.levers.kl_anchor import LEAST, MOST, STEPS_A_UNIT, KlAnchor
from holdfast.lineage import locate
from holdfast.prepare import Prepared, load, prepare
from holdfast.recipe import Recipe
from holdfast.reference import frozen, remembered

if TYPE_CHECKING:
    from rich.table import Table
    from torch import Tensor
    from transformers import PreTrainedModel


FOUR_BIT = (4 + 0.127) / 8
"""Bytes a weight under QLoRA, with its quantized scales (arXiv 2305.14314, section 3)."""


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
class ReferencePlan:
    """Where the base's probabilities come from, and what that costs."""

    source: str
    """remembered, adapter_off, frozen, cache or stage."""
    why: str
    bytes: int
    """Of a second copy (a stage is taken to be of the model's size), of the remembered states (at
    most), or of a cache on disk."""
    device: str
    """Where a second copy lies: beside the model, or what was asked for."""
    forward_share: float
    """Share of the tokens that pass through the base as well: in each step, or, where it remembers
    them, of the whole run's before the first; 0 with a cache."""
    step_share: float
    """Time of those passes beside the rest of the steps, an estimate; see `_reference`."""

    def lines(self) -> list[str]:
        """What is chosen and why, and its cost."""
        if self.source == "cache":
            cost = f"{_size(self.bytes)} on disk, memory-mapped; no second pass"
        elif self.source == "remembered":
            cost = (
                f"at most {_size(self.bytes)} of memory beside the model; each text once before "
                f"training, about {self.step_share:.0%} of the steps' time"
            )
        else:
            copied = f"{_size(self.bytes)} {self.device}; " if self.bytes else "no second copy; "
            cost = (
                f"{copied}one more forward pass over {self.forward_share:.0%} of the tokens, about "
                f"{self.step_share:.0%} of a step"
            )
        if self.device == frozen.OFFLOAD:
            cost += f", and {_size(self.bytes)} brought over in each pass"
        return [f"{self.source}: {self.why}", cost]


@dataclass(frozen=True)
class Plan:
    """What a run will cost."""

    parameters: int
    trainable: int
    steps: int
    learning_rate: float
    """At its peak."""
    anchor_weight: float
    """Of the mean KL beside the lesson's mean loss; 0: none. Where `anchor_scales`, for each
    nat of the base's loss on the canary, which is not known yet."""
    anchor_scales: bool
    """Whether the weight is the automatic one, which that loss is a factor of."""
    batch_tokens: int
    """Tokens of one step, over all devices."""
    max_length: int
    """Longest row in tokens."""
    micro_batches: int
    """Forward passes of one step, over all devices."""
    streams: tuple[StreamPlan, ...]
    memory: dict[str, int]
    """Bytes by part; see the formula above."""
    reference: ReferencePlan | None
    """None where nothing is anchored."""

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
        table.add_row("learning rate", f"{self.learning_rate:.2g}")
        if self.anchor_weight:
            times = f" times the base's loss on the canary in nats; {LEAST:g} to {MOST:g}"
            weight = f"{self.anchor_weight:.3g}{times if self.anchor_scales else ''}"
            table.add_row("anchor weight", weight)
        table.add_row("longest row", f"{self.max_length:,} tokens", end_section=True)
        for stream in self.streams:
            table.add_row(stream.name, _stream_line(stream))
        table.add_section()
        if self.reference is not None:
            first, *rest = self.reference.lines()
            table.add_row("reference", first)
            for line in rest:
                table.add_row("", line)
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
    recipe = settled(recipe)
    anchor = recipe.levers.kl_anchor
    scales = anchor.weight == "auto"
    with tempfile.TemporaryDirectory() as folder:
        prepared = sketch(recipe, Path(folder), console or Console(quiet=True))
        try:
            model = wrapped(recipe.levers.active(), prepared.setup.model)
        except NotImplementedError as error:
            raise RequestError(
                f"levers.adapter.method: '{recipe.levers.adapter.method}' looks at the weights, so "
                "its cost is not known before they are loaded; train without --dry-run"
            ) from error
        return Plan(
            parameters=sum(p.numel() for p in model.parameters()),
            trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
            steps=prepared.steps,
            learning_rate=recipe.levers.budget.peak(model.config, not recipe.levers.adapter.off),
            anchor_weight=prepared.steps / STEPS_A_UNIT if scales else anchor.strength(0),
            anchor_scales=scales,
            batch_tokens=prepared.mixture.batch_tokens,
            max_length=prepared.setup.max_length,
            micro_batches=prepared.mixture.micro_batches,
            streams=tuple(_streams(prepared)),
            memory=memory(recipe, model, prepared.setup.max_length),
            reference=_reference(recipe, model, prepared),
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
    recipe = settled(recipe)
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


def settled(recipe: Recipe) -> Recipe:
    """The recipe with `levers.adapter.method: auto` replaced by what it means for its model."""
    adapter = recipe.levers.adapter
    if adapter.method.lower() != "auto":
        return recipe
    parameters = sys.maxsize
    if recipe.levers.kl_anchor.reference != "adapter_off":
        with suppress(RequestError):  # whoever loads the model says what is wrong with it
            parameters = skeleton(recipe).num_parameters()
    levers = recipe.levers.model_copy(update={"adapter": adapter.settled(parameters)})
    return recipe.model_copy(update={"levers": levers})


def skeleton(recipe: Recipe) -> PreTrainedModel:
    """The base without its weights: the shapes that its config asks for, on the meta device."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = recipe.model
    models.check_folder(settings)
    stage = locate(settings.path, settings.revision)
    try:
        config = AutoConfig.from_pretrained(
            stage.model,
            revision=stage.revision,
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

    held = sum(_bytes(p) for p in model.parameters())
    if recipe.levers.adapter.four_bit:
        inside = [m.weight for m in models.causal_lm(model).get_decoder().modules() if _frozen(m)]
        held += sum(round(w.numel() * FOUR_BIT) - _bytes(w) for w in inside)
    trained = sum(_bytes(p) for p in model.parameters() if p.requires_grad)
    tokens, anchor = recipe.train.micro_batch_tokens, recipe.levers.kl_anchor
    width = 2 if torch.cuda.is_available() else model.get_input_embeddings().weight.element_size()
    vocabulary, size = model.get_input_embeddings().weight.shape
    # one buffer does for a cache, whose bucketed divergence has the softmax that the NLL needs
    buffers = (
        2 if anchor.weight and (anchor.cache is None or anchor.divergence.temperature != 1) else 1
    )
    chunk = 4 * vocabulary * min(tokens, chunk_rows(_home(), vocabulary, buffers))
    head = model.get_output_embeddings()
    head_gradient = 4 * vocabulary * size if head is not None and head.weight.requires_grad else 0
    return {
        "weights": held,
        "casts": sum(width * p.numel() for p in model.parameters() if p.element_size() > width),
        "reference": 0 if anchor.reference_device else _copied(recipe, model),
        "gradients": trained,
        "optimizer": 2 * trained,
        "activations": tokens
        * _activations(model, width, max_length, recipe.train.activation_checkpointing),
        "logits": buffers * chunk + head_gradient,
    }


def _frozen(module: Any) -> bool:
    """Whether this is a matrix of the base, which 4 bits are for."""
    import torch

    return isinstance(module, torch.nn.Linear) and not module.weight.requires_grad


def _copied(recipe: Recipe, model: Any) -> int:
    """Bytes of a second copy; 0 where there is none."""
    anchor = recipe.levers.kl_anchor
    source, _ = anchor.source(hasattr(model, "disable_adapter"))
    if not anchor.weight or source in ("adapter_off", "cache"):
        return 0
    if source == "remembered":  # of the base only the head, where the model's own will move
        head = models.head(model)
        return _bytes(head.weight_VH) if head.trained else 0
    return frozen.size(models.causal_lm(model), anchor.reference_dtype, _home())


def _home() -> str:
    """Type of the device that will train."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _reference(recipe: Recipe, model: Any, prepared: Prepared) -> ReferencePlan | None:
    """The reference and its cost.

    Time is counted in forward passes over the step's tokens: one, backward through the activations
    one, through the weights another where all are trained, one more where activations are
    recomputed. The base's pass over a share of the tokens is that share of one. What it remembers
    it reads once: the tokens of all steps, over the times that each stream is gone through.
    """
    anchor, adapter = recipe.levers.kl_anchor, hasattr(model, "disable_adapter")
    if not anchor.weight:
        return None
    source, why = anchor.source(adapter)
    held = _copied(recipe, model)
    read = [stream for stream in prepared.streams if stream.role in anchor.kl_roles()]
    share = sum(stream.share for stream in read) * anchor.share
    if source == "remembered":
        taken = {stream.name: stream for stream in _streams(prepared)}
        once = sum(taken[one.name].tokens / max(1, taken[one.name].epochs or 1) for one in read)
        share = once / sum(stream.tokens for stream in taken.values())
        held = remembered.size(model, once)
    if anchor.cache is not None:
        from holdfast.reference.cache import Manifest

        share, parts = 0.0, Manifest.read(Path(anchor.cache)).parts
        held = sum(part["bytes"] for part in parts.values())
    passes = (2 if adapter else 3) + recipe.train.activation_checkpointing
    lies = anchor.reference_device
    device = (
        "beside the model" if lies is None else lies if lies == frozen.OFFLOAD else f"on {lies}"
    )
    return ReferencePlan(source, why, held, device, share, share / passes)


def _activations(model: Any, width: int, row: int, checkpointed: bool) -> int:
    """Bytes a token that autograd keeps, over all layers."""
    config = model.config.get_text_config()
    H, L = config.hidden_size, config.num_hidden_layers
    heads = getattr(config, "num_attention_heads", None) or 1  # recurrent ones have none
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
    sizes = getattr(config, "intermediate_size", None) or 4 * hidden
    size: int = max(sizes) if isinstance(sizes, list) else sizes  # one a layer
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
