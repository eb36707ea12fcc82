"""A model's memory as slots: keys and values of many rows side by side, written in place.

Shapes: S slots, W columns that some row still sees, C columns held, h key-value heads, D head size,
V vocabulary, n prompts, L tokens.

All rows are *right-aligned*: the next token of every row goes to the same column, so a row that
enters late is put in front of that column, where a left-padded row of `generate` would stand. What
the model is given (2-d mask, position ids, a transformers cache) is what `generate` gives it, and
so sliding windows, learned positions and ALiBi work as transformers wrote them.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SLACK = 4
"""A cache holds 1/SLACK more columns than the longest row, so that it is moved back once in a
while and not at each token."""


@dataclass
class Window:
    """The columns of the cache that some row still sees: `begin` up to, without it, `end`."""

    begin: int
    end: int


class SlotLayer(DynamicLayer):
    """One layer's keys and values (S, h, C, D), each token written in place.

    A layer with a sliding window holds all columns too: transformers' mask hides those outside.
    """

    def __init__(self, window: Window, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.window, self.held = window, [keys, values]
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the next column; the columns seen, that one included."""
        begin, end = self.window.begin, self.window.end
        keys, values = self.held
        keys[:, :, end] = key_states[:, :, 0]
        values[:, :, end] = value_states[:, :, 0]
        return keys[:, :, begin : end + 1], values[:, :, begin : end + 1]

    def get_seq_length(self) -> int:
        """Columns seen before the next token."""
        return self.window.end - self.window.begin


Past = list[tuple[Tensor, Tensor]]
"""Keys and values (n, h, length, D) of each layer."""


class Slots:
    """S rows of a model's memory, right-aligned in one window."""

    def __init__(self, lm: PreTrainedModel, like: Past, count: int, longest: int, end: int) -> None:
        """All slots empty.

        Args:
            like: keys and values of the shapes to hold.
            longest: tokens of the longest row, from its first to its last.
            end: tokens that at most enter in front of the window's end.
        """
        self.lm, self.most, self.columns = lm, end, longest + longest // SLACK + 1
        self.window = Window(end, end)
        self.start_S = torch.full((count,), end, device=like[0][0].device)
        self.padded = False
        self.layers = [
            SlotLayer(
                self.window,
                *(  # zeros: what a mask hides is multiplied by 0, which leaves no NaN in place
                    part.new_zeros(count, part.shape[1], self.columns, part.shape[3])
                    for part in layer
                ),
            )
            for layer in like
        ]
        self.cache = Cache(layers=list(self.layers))

    def put(self, slots: list[int], prompts: Sequence[list[int]], prefix: Past) -> None:
        """Read all but the last token of each prompt into a slot; all begin with `prefix`."""
        skip = prefix[0][0].shape[2] if prefix else 0
        longest = max(map(len, prompts)) - 1
        past, end = prefix, self.window.end
        if longest > skip:
            ids = torch.zeros(len(prompts), longest - skip, dtype=torch.long)
            for row, prompt in enumerate(prompts):  # right padding: a causal model never looks
                ids[row, : len(prompt) - 1 - skip] = torch.tensor(prompt[skip:-1])
            past = read(self.lm, ids.to(self.start_S.device), prefix)
        for length in {len(prompt) - 1 for prompt in prompts}:
            members = [i for i, prompt in enumerate(prompts) if len(prompt) - 1 == length]
            into = torch.tensor([slots[i] for i in members], device=self.start_S.device)
            self.start_S[into] = end - length
            for layer, parts in zip(self.layers, past if length else (), strict=False):
                for held, part in zip(layer.held, parts, strict=True):
                    rows = part[members] if len(part) > 1 else part
                    held[into, :, end - length : end] = rows[:, :, :length]

    def see(self, live: list[int]) -> None:
        """Only these slots count from now on: the window begins with the first of their tokens."""
        starts = self.start_S[live].tolist()
        self.window.begin = min(starts)
        self.padded = max(starts) > self.window.begin

    def keep(self, live: list[int]) -> list[int]:
        """Give the other slots up: the last live ones move into the gaps between the first.

        Returns:
            For each slot that is left, which it was.
        """
        left, gone = len(live), set(range(len(live))) - set(live)
        into, moved = sorted(gone), [slot for slot in live if slot >= left]
        order = list(range(left))
        for slot, was in zip(into, moved, strict=True):
            order[slot] = was
        self.start_S = self.start_S[order]
        begin, end = self.window.begin, self.window.end
        for layer in self.layers:
            for part in layer.held:
                part[into, :, begin:end] = part[moved, :, begin:end]
            layer.held = [part[:left] for part in layer.held]
        return order

    def step(self, token_S: Tensor) -> Tensor:
        """Each row's next token in, the logits (S, V) after it out."""
        if self.window.end == self.columns:
            self._move_back()
        begin, end = self.window.begin, self.window.end
        start_S1 = self.start_S.clamp(min=begin)[:, None]
        columns_W = torch.arange(begin, end + 1, device=token_S.device)
        mask_SW = (columns_W >= start_S1).long() if self.padded else None
        logits_SV = _forward(self.lm, token_S[:, None], end - start_S1, mask_SW, self.cache)
        self.window.end += 1
        return logits_SV

    def _move_back(self) -> None:
        """Move what is seen to the front, behind room for the longest prompt."""
        begin, end = self.window.begin, self.window.end
        width = end - begin
        front = max(0, self.most - width)
        for layer in self.layers:
            for part in layer.held:
                part[:, :, front : front + width] = part[:, :, begin:end].clone()
        self.start_S += front - begin
        self.window.begin, self.window.end = front, front + width


def read(lm: PreTrainedModel, ids_nL: Tensor, past: Past) -> Past:
    """Keys and values of the columns of `past` (one row, for all) and of `ids` after them."""
    cache = DynamicCache()
    for index, layer in enumerate(past):
        cache.update(*(part.expand(len(ids_nL), -1, -1, -1) for part in layer), index)
    begin = cache.get_seq_length()
    positions_L = torch.arange(begin, begin + ids_nL.shape[1], device=ids_nL.device)
    _forward(lm, ids_nL, positions_L.expand_as(ids_nL), None, cache)
    if not cache.layers or any(type(layer) is not DynamicLayer for layer in cache.layers):
        raise TypeError("the cache of this architecture is not one of keys and values")
    return [(layer.keys, layer.values) for layer in cache.layers]


def _forward(
    lm: PreTrainedModel, ids: Tensor, positions: Tensor, mask: Tensor | None, cache: Cache
) -> Tensor:
    """Logits of the last position: (n, V)."""
    lm_class: Any = type(lm)
    known = {"position_ids": positions, "logits_to_keep": 1}
    extra = {name: value for name, value in known.items() if name in _arguments(lm_class)}
    out = lm(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **extra)
    logits: Tensor = out.logits[:, -1]
    return logits


@cache
def _arguments(lm_class: Any) -> frozenset[str]:
    return frozenset(inspect.signature(lm_class.forward).parameters)


def shapes(lm: PreTrainedModel) -> Past | None:
    """Keys and values of one row if slots hold this architecture's memory, else None.

    Tried with two texts of 4 and 7 tokens: they enter side by side, two tokens short, and are
    written on; the logits must be those of each text alone, read at once without a cache.
    """
    vocabulary = lm.config.get_text_config().vocab_size
    texts = [[(3 * i + n) % vocabulary for i in range(n)] for n in (4, 7)]
    try:
        expected = [
            lm(input_ids=torch.tensor([text], device=lm.device), use_cache=False).logits[0, -2:]
            for text in texts
        ]
        like = read(lm, torch.zeros(1, 1, dtype=torch.long, device=lm.device), [])
        slots = Slots(lm, like, 2, longest=7, end=5)
        slots.put([1, 0], [text[:-1] for text in texts], [])
        slots.see([0, 1])
        found = [
            slots.step(torch.tensor([texts[1][i], texts[0][i]], device=lm.device)) for i in (-2, -1)
        ]
    except Exception:  # whatever an architecture makes of a cache that is not its own
        return None
    ours = torch.stack(found, 1).flip(0).float()  # text, place, V
    theirs = torch.stack(expected).float()
    near = (1e-3 if lm.dtype == torch.float32 else 5e-2) * float(theirs.abs().max())
    return like if float((ours - theirs).abs().max()) <= near else None
