"""Context frozen: loss and gradient on decision tokens alone; the context is read without gradient.

Source: truncated backpropagation (Williams & Peng 1990), cut where the first response begins; the
context is kept as generation keeps it, in transformers' cache of keys and values.
Equation: the loss is the full sequence's; its gradient that of sum_t NLL(y_t | K_c, V_c, y_<t) with
the context's keys and values K_c, V_c constant. What the weights do to the context's own keys and
values is left out, so this is an approximation: the less, the more of a row is response.
Acts on: the forward pass of lesson rows. A row's context ends before the position that predicts its
first learned token; whatever follows it, later turns of a user included, has a gradient. Rows of
other roles (anchors, replay), and rows that are learned from their first token on, run as ever.
Cost: less than none: no activation of the context is kept for backward, and nothing is computed
backward for it; figures in docs/levers.md.

Each document of a packed row gets a row of its own here. Contexts are padded on the left and
decisions on the right, so that they meet at one column; documents of like lengths go together.

Shape suffixes: B rows, W positions in a row, H hidden size, n documents of a group, C columns of
its contexts, D of its decisions, L = C + D.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from holdfast import model as models
from holdfast.data.example import Role
from holdfast.errors import RequestError
from holdfast.levers import Lever, Setup

if TYPE_CHECKING:
    import torch

PADDING = 1.5
"""Documents go together while their columns are at most so many times their tokens, contexts and
decisions each."""


class ContextFrozen(Lever):
    """Lesson rows are learned from behind a context that takes no gradient. Off by default."""

    OFF: ClassVar = {"enabled": False}

    enabled: bool = False
    """Read the context without gradient. Saves memory and time where prompts are long and responses
    short; its gradient is an approximation."""

    def prepare(self, setup: Setup) -> None:
        """Hold, by trying, that the model reads on from a cache as it reads a whole row.

        Raises:
            RequestError: it does not.
        """
        if self.enabled:
            _try(setup.model)

    def hidden(self, model: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        """The last hidden states (B, W, H); those of a context are zero, for nothing is asked."""
        return hidden_states(model, batch) if self.enabled else None


class Document(NamedTuple):
    """A document of a micro-batch: where it lies, and what of it is context."""

    row: int
    start: int
    """Its first position in the row."""
    context: int
    """Positions before the one that predicts the first learned token."""
    length: int
    """Positions up to, with it, the one that predicts the last learned token."""

    @property
    def decision(self) -> int:
        """Positions that are run with gradient."""
        return self.length - self.context


def hidden_states(model: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The last hidden states (B, W, H) at every position with a role."""
    import torch

    ids_BW, roles_BW = batch["input_ids"], batch["roles"]
    lesson_B = (roles_BW == Role.TASK).any(1)
    inner = _within_ddp(model)
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    for group in groups(documents(batch["position_ids"], roles_BW, lesson_B)):
        found.append(_read(inner if found else model, inner, ids_BW, group))
    rows_b = (~lesson_B).nonzero().squeeze(1)
    if len(rows_b):
        outer = inner if found else model
        hidden_bWH = models.hidden_states(outer, ids_BW[rows_b], batch["position_ids"][rows_b])
        places_BW = torch.arange(ids_BW.numel(), device=ids_BW.device).view_as(ids_BW)
        found.append((places_BW[rows_b].flatten(), hidden_bWH.flatten(0, 1)))
    places, hidden = (torch.cat(parts) for parts in zip(*found, strict=True))
    whole = hidden.new_zeros(ids_BW.numel(), hidden.shape[1])
    return whole.index_copy(0, places, hidden).view(*ids_BW.shape, -1)


def _within_ddp(model: Any) -> Any:
    """The model that is read with in all passes but one.

    Processes have different numbers of groups, and each pass through DDP is one of all processes:
    there is one in each micro-batch, with gradient.
    """
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
    from torch.nn.parallel import DistributedDataParallel

    if isinstance(model, FSDPModule | FullyShardedDataParallel):
        raise RequestError(
            "levers.context_frozen: not under FSDP, where all processes must read as many times; "
            "set levers.context_frozen.enabled: false, or train with DDP"
        )
    return model.module if isinstance(model, DistributedDataParallel) else model


def documents(
    position_ids_BW: torch.Tensor, roles_BW: torch.Tensor, wanted_B: torch.Tensor
) -> Iterator[Document]:
    """Every document of the wanted rows that has a role; only the lesson's have a context."""
    import numpy as np

    positions, roles_of = position_ids_BW.cpu().numpy(), roles_BW.cpu().numpy()
    for row in wanted_B.nonzero().squeeze(1).tolist():
        starts = np.flatnonzero(positions[row] == 0)
        for start, stop in zip(starts, [*starts[1:], None], strict=True):
            roles = roles_of[row, start:stop]
            learned = np.flatnonzero(roles)
            if len(learned):
                context = learned[0] if roles[learned[0]] == Role.TASK else 0
                yield Document(row, int(start), int(context), int(learned[-1]) + 1)


def groups(found: Iterator[Document]) -> list[list[Document]]:
    """Documents that are read side by side, the longest first into the first group that fits."""
    grouped: list[list[Document]] = []
    for document in sorted(found, key=lambda d: (-d.decision, -d.context, d)):
        for group in grouped:
            if _fit([*group, document]):
                group.append(document)
                break
        else:
            grouped.append([document])
    return grouped


def _fit(group: Sequence[Document]) -> bool:
    contexts = [document.context for document in group]
    decisions = [document.decision for document in group]
    return (min(contexts) > 0 or max(contexts) == 0) and all(
        max(lengths) * len(group) <= PADDING * sum(lengths) for lengths in (contexts, decisions)
    )


def _read(
    model: Any, inner: Any, ids_BW: torch.Tensor, group: Sequence[Document]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Places (k,) in the flattened micro-batch and hidden states (k, H) of a group's decisions.

    Contexts are read by `inner`.
    """
    import torch

    row_n1, start_n1, context_n1, length_n1 = torch.tensor(group, device=ids_BW.device).T[..., None]
    C, D = int(context_n1.max()), int((length_n1 - context_n1).max())
    place_nL = context_n1 + torch.arange(-C, D, device=ids_BW.device)
    real_nL = (place_nL >= 0) & (place_nL < length_n1)
    flat_nL = row_n1 * ids_BW.shape[1] + start_n1 + place_nL.clamp(min=0).minimum(length_n1 - 1)
    ids_nL = ids_BW.flatten()[flat_nL]
    more: dict[str, Any] = {}
    if C:
        # a padding column has the position of its neighbour: none is beyond the model's context
        place_nL = place_nL.clamp(min=0).minimum(length_n1 - 1)
        mask_nL = None if bool(real_nL.all()) else real_nL.long()
        more = _after_context(inner, ids_nL[:, :C], place_nL[:, :C], mask_nL)
    hidden_nDH = models.hidden_states(model, ids_nL[:, C:], place_nL[:, C:], **more)
    decided_nD = real_nL[:, C:]
    return flat_nL[:, C:][decided_nD], hidden_nDH[decided_nD]


def _after_context(
    model: Any, ids_nC: torch.Tensor, place_nC: torch.Tensor, mask_nL: torch.Tensor | None
) -> dict[str, Any]:
    """Read contexts without gradient; what the model is to be given with the decisions."""
    import torch
    from transformers import DynamicCache

    cache, kind, C = DynamicCache(), ids_nC.device.type, ids_nC.shape[1]
    mask_nC = None if mask_nL is None else mask_nL[:, :C]
    # autocast of older torch keeps what it casts here, cut off from its gradient, for what follows
    precision = torch.autocast(
        kind,
        torch.get_autocast_dtype(kind),
        enabled=torch.is_autocast_enabled(kind),
        cache_enabled=False,
    )
    more = {"past_key_values": cache, "use_cache": True}
    with torch.no_grad(), precision:
        models.hidden_states(model, ids_nC, place_nC, attention_mask=mask_nC, **more)
    if cache.get_seq_length() != C:
        raise RequestError(
            "levers.context_frozen: the model kept no keys and values of the context, as under "
            "activation checkpointing; set train.activation_checkpointing: false"
        )
    return {**more, "attention_mask": mask_nL}


def _try(model: Any) -> None:
    """Two short documents, side by side behind contexts of two lengths, against each alone."""
    import torch

    lm = models.causal_lm(model)
    lengths = (9, 6)
    ids = torch.arange(16, device=lm.device) * 7919 % lm.config.get_text_config().vocab_size
    places = torch.cat([torch.arange(n, device=lm.device) for n in (*lengths, 1)])
    roles = torch.zeros_like(ids)
    roles[5:8] = roles[12:14] = int(Role.TASK)
    batch = {"input_ids": ids[None], "position_ids": places[None], "roles": roles[None]}
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            ours = hidden_states(model, batch)[0, roles > 0].float()
            alone = [
                models.hidden_states(model, ids[None, part], places[None, part])[0]
                for part in (slice(0, 9), slice(9, 15))
            ]
            theirs = torch.cat([alone[0][5:8], alone[1][3:5]]).float()
        same = ours.shape == theirs.shape
        # rounding is far less than the square root of the precision
        near = torch.finfo(lm.dtype).eps ** 0.5
        same = same and bool((ours - theirs).norm() <= near * theirs.norm())
    except Exception:  # whatever an architecture makes of a cache that is not its own
        same = False
    finally:
        model.train(training)
    if not same:
        raise RequestError(
            f"levers.context_frozen: {type(lm).__name__} does not read on from keys and values of "
            "its context alone (it has recurrent or convolutional layers, or another memory); set "
            "levers.context_frozen.enabled: false"
        )
