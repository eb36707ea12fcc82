"""Writing on from many prompts at once: a cache of slots, refilled as soon as a row ends.

Shapes: S slots, V vocabulary (in K blocks of b tokens), N most new tokens, T tail of a stop string.

Against `generate`, each token is written in place instead of copying the whole cache, an ended row
makes room at once, what all prompts begin with is computed once, and a draw costs one number.

On an accelerator a step costs much the same however many rows it has, so a free slot is refilled
at once. On a CPU it costs what its rows cost, and a late row pays for the columns of those that
came before it; so slots are given up as rows end, and refilled when none is left.

A cache of slots holds keys and values. Whether an architecture's memory is made of these is found
by trying (`slots.shapes`); where it is not (Mamba and other recurrent models), `generate` writes.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, takewhile
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import GenerationConfig
from transformers.generation import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteriaList,
    StopStringCriteria,
)

from holdfast.errors import NotFiniteError, RequestError
from holdfast.model import causal_lm
from holdfast.slots import Past, Slots, read, shapes

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CACHE_BYTES = 2**31
"""Keys and values of all slots, as far as `slots` is not given."""
MOST_SLOTS = 256
"""Beyond it a row is no cheaper, on CPUs at least (benchmarks/sampling.py)."""
FEW_SLOTS = 64
"""Where `generate` writes: rows side by side, which end together."""
PREFILL_TOKENS = 8192
"""Padded prompt tokens read in one forward pass."""
REFILL = 8
"""Prompts that have to be read first wait until 1/REFILL of the slots are free."""
SHRINK = 10
"""Slots that stay empty are given up as soon as they are more than 1/SHRINK of all."""
BLOCK = 64
"""Tokens whose probabilities are summed before any is looked at."""


def write_on(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int | Sequence[int],
    temperature: float | None = None,
    seed: Sequence[int] = (0,),
    first: int = 0,
    stop: Sequence[str] = (),
    stop_in_prompt: bool = True,
    slots: int | None = None,
    refill: bool | None = None,
    told: Callable[[int], None] = lambda _rows: None,
) -> list[list[int]]:
    """What the model writes after each prompt, up to and with its end token or stop string.

    The model's own generation settings (top_p, a repetition penalty, ...) would bend its
    distribution, so only their end tokens count.

    Row i draws its tokens with numbers that depend on (seed, first + i) alone, one for each token,
    so neither the other prompts nor the number of slots decide what it says, but for the last bits
    of a matrix product: they depend on its shape, and where a draw falls within them of the border
    of two tokens (about one in a million in fp32, more in bf16) the row takes the other one.

    Args:
        prompts: token ids, at least one each.
        max_new_tokens: for all prompts, or one for each.
        temperature: 1 samples the model's own distribution; None takes the likeliest token.
        seed: non-negative whole numbers; the global generators are neither read nor moved.
        stop: strings after which to stop, by transformers' `StopStringCriteria`.
        stop_in_prompt: whether one may begin in the prompt, as in `generate`.
        slots: rows side by side; empty: as many as `CACHE_BYTES` hold, at most `MOST_SLOTS`.
        refill: fill a slot as soon as its row ends; empty: on accelerators (see above).
        told: called with the number of rows written, whenever it grows.
    """
    if any(not prompt for prompt in prompts):
        raise RequestError("a prompt is empty; give a model at least one token to go on from: BOS")
    if not prompts:
        return []
    if isinstance(max_new_tokens, int):
        max_new_tokens = [max_new_tokens] * len(prompts)
    limits = list(max_new_tokens)
    lm = causal_lm(model)
    job = Job(
        prompts=[list(prompt) for prompt in prompts],
        limits=limits,
        ends=end_tokens(lm, tokenizer),
        pad=tokenizer.pad_token_id,
        temperature=temperature,
        uniforms=lambda row: np.random.default_rng([*seed, first + row]).random(limits[row]),
        stopped=_stopped(tokenizer, stop),
        stop_in_prompt=stop_in_prompt,
    )
    training = lm.training
    lm.eval()
    result: list[list[int]] = [[] for _ in prompts]
    done = 0
    lm.eval()
    try:
        with torch.inference_mode():
            like = shapes(lm)
            if like is None:
                ended = _write_by_generate(lm, job, slots or FEW_SLOTS)
            else:
                ended = _write_in_slots(lm, job, like, slots or _room(like, job), refill)
            for row, tokens in ended:
                result[row] = tokens
                done += 1
                told(done)
    finally:
        lm.train(training)
    return result


def end_tokens(lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a text: the tokenizer's, and those of the model's generation settings."""
    theirs = lm.generation_config.eos_token_id
    ends = {*(theirs if isinstance(theirs, list) else [theirs]), tokenizer.eos_token_id}
    return sorted(ends - {None})


@dataclass(frozen=True)
class Job:
    """What is to be written."""

    prompts: list[list[int]]
    limits: list[int]
    """Most new tokens of each row."""
    ends: list[int]
    pad: int
    temperature: float | None
    uniforms: Callable[[int], np.ndarray[Any, Any]]
    """The numbers in [0, 1) that a row draws its tokens with."""
    stopped: StopStringCriteria | None
    stop_in_prompt: bool

    def rows(self) -> list[int]:
        """Those that may write at all."""
        return [row for row, limit in enumerate(self.limits) if limit > 0]


def _stopped(tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> StopStringCriteria | None:
    try:
        return StopStringCriteria(tokenizer, list(stop)) if stop else None
    except ValueError:  # no token of the vocabulary ends any of them, so none will ever be written
        return None


def choose(logits_SV: Tensor, uniform_S: Tensor, temperature: float | None) -> Tensor:
    """The likeliest token, or that whose interval of the cumulative distribution holds u: (S,).

    -1 where the logits hold no distribution (a NaN).
    Probabilities and their sum over a block in fp32, running sums in fp64: of blocks first, then
    within the one block.
    """
    if temperature is None:
        token_S = logits_SV.argmax(-1)
        most_S = logits_SV.gather(-1, token_S[:, None])[:, 0]
        return torch.where(most_S.isnan(), -1, token_S)
    count, vocabulary = logits_SV.shape
    p_SV = (logits_SV.float() if temperature == 1 else logits_SV.float() / temperature).softmax(-1)
    if vocabulary % BLOCK:
        p_SV = pad(p_SV, (0, -vocabulary % BLOCK))
    p_SKb = p_SV.view(count, -1, BLOCK)
    upto_SK = p_SKb.sum(-1).cumsum(-1, dtype=torch.float64)
    target_S1 = (uniform_S * upto_SK[:, -1])[:, None]
    sound_S = upto_SK[:, -1].isfinite()
    block_S1 = torch.searchsorted(upto_SK, target_S1, right=True).clamp(max=upto_SK.shape[1] - 1)
    before_SK = pad(upto_SK, (1, 0))
    p_Sb = p_SKb[torch.arange(count, device=block_S1.device), block_S1[:, 0]]
    upto_Sb = before_SK.gather(1, block_S1) + p_Sb.cumsum(-1, dtype=torch.float64)
    # rounding may leave the sum within a block short of the sum over blocks: its last token then
    last_S = BLOCK - 1 - (p_Sb > 0).flip(-1).long().argmax(-1)
    place_S = torch.searchsorted(upto_Sb, target_S1, right=True)[:, 0].minimum(last_S)
    return torch.where(sound_S, block_S1[:, 0] * BLOCK + place_S, -1)


def _room(like: Past, job: Job) -> int:
    """Slots that `CACHE_BYTES` hold."""
    token_bytes = sum(part.numel() * part.element_size() for layer in like for part in layer)
    longest = max(len(p) + n for p, n in zip(job.prompts, job.limits, strict=True))
    room = CACHE_BYTES // (token_bytes * longest)
    return max(1, min(MOST_SLOTS, room, len(job.prompts)))


# ---- the two ways to write


def _write_in_slots(
    lm: PreTrainedModel, job: Job, like: Past, count: int, refill: bool | None
) -> Iterator[tuple[int, list[int]]]:
    """(row, its new tokens) of each row, as they end."""
    prompts, device = job.prompts, lm.device
    longest = max(len(p) + n for p, n in zip(prompts, job.limits, strict=True))
    # the longest first: prompts of like length are read together, and short rows fill the end
    queue = deque(sorted(job.rows(), key=lambda i: (-len(prompts[i]) - job.limits[i], i)))
    shared = _common([prompt[:-1] for prompt in prompts])
    prefix = read(lm, torch.tensor([shared], device=device), []) if shared else []
    alike = all(len(prompt) - 1 == len(shared) for prompt in prompts)
    eager = device.type != "cpu" if refill is None else refill
    wait = 1 if alike else math.ceil(count / REFILL)
    rows: list[int | None] = []
    while queue or any(row is not None for row in rows):
        free = [slot for slot, row in enumerate(rows) if row is None]
        if queue and len(free) == len(rows):
            rows = [None] * min(count, len(queue))
            free = list(range(len(rows)))
            slots = Slots(lm, like, len(rows), longest, end=max(map(len, prompts)) - 1)
            desk = _Desk.empty(len(rows), job, device)
        if queue and (len(free) == len(rows) or (eager and len(free) >= wait)):
            taken = [(slot, queue.popleft()) for slot in free[: len(queue)]]
            for some in _by_size(taken, [len(prompts[row]) for _, row in taken]):
                slots.put([slot for slot, _ in some], [prompts[row] for _, row in some], prefix)
            for slot, row in taken:
                rows[slot] = row
                desk.seat(slot, row, job)
            slots.see([slot for slot, row in enumerate(rows) if row is not None])
        elif not (queue and eager) and len(free) > len(rows) / SHRINK:
            order = slots.keep([slot for slot, row in enumerate(rows) if row is not None])
            rows = [rows[slot] for slot in order]
            desk.keep(order)
        ended = desk.take(slots.step(desk.token_S), job)
        for slot, tokens in ended:
            written = rows[slot]
            assert written is not None
            rows[slot] = None
            yield written, tokens
        live = [slot for slot, row in enumerate(rows) if row is not None]
        if ended and live:
            slots.see(live)


def _common(prompts: Sequence[list[int]]) -> list[int]:
    """What all begin with: it is what the first and the last in order begin with."""
    least, most = min(prompts), max(prompts)
    return [
        a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(least, most, strict=False))
    ]


def _by_size(taken: list[Any], lengths: Sequence[int]) -> Iterator[list[Any]]:
    """Neighbours together, as many as make `PREFILL_TOKENS` of the longest; at least one."""
    begin = 0
    while begin < len(taken):
        end = begin + 1
        while end < len(taken) and max(lengths[begin : end + 1]) * (end + 1 - begin) <= (
            PREFILL_TOKENS
        ):
            end += 1
        yield taken[begin:end]
        begin = end


@dataclass
class _Desk:
    """What is known of the row in each slot; N is the most new tokens of any row."""

    token_S: Tensor
    """The last token, which the model has not read yet."""
    written_S: Tensor
    limit_S: Tensor
    """0 in an empty slot."""
    uniform_SN: Tensor
    out_SN: Tensor
    tail_ST: Tensor
    """The last tokens as far as a stop string may reach, into the prompt if it may begin there."""
    ends: Tensor

    @classmethod
    def empty(cls, count: int, job: Job, device: torch.device) -> _Desk:
        def whole(*shape: int, fill: int = 0) -> Tensor:
            return torch.full(shape, fill, dtype=torch.long, device=device)

        most = max(job.limits)
        tail = job.stopped.maximum_token_len if job.stopped is not None else 1
        return cls(
            whole(count, fill=job.pad),
            whole(count),
            whole(count),
            torch.zeros(count, most, dtype=torch.float64, device=device),
            whole(count, most),
            whole(count, tail, fill=job.pad),
            torch.tensor(job.ends, dtype=torch.long, device=device),
        )

    def seat(self, slot: int, row: int, job: Job) -> None:
        """A row enters."""
        prompt, limit = job.prompts[row], job.limits[row]
        self.token_S[slot] = prompt[-1]
        self.written_S[slot] = 0
        self.limit_S[slot] = limit
        if job.temperature is not None:
            self.uniform_SN[slot, :limit] = torch.from_numpy(job.uniforms(row))
        width = self.tail_ST.shape[1]
        tail = [job.pad] * width + (prompt if job.stop_in_prompt else [])
        self.tail_ST[slot] = torch.tensor(tail[-width:])

    def keep(self, slots: list[int]) -> None:
        """The rows of the other slots leave."""
        for name in ("token_S", "written_S", "limit_S", "uniform_SN", "out_SN", "tail_ST"):
            setattr(self, name, getattr(self, name)[slots])

    def take(self, logits_SV: Tensor, job: Job) -> list[tuple[int, list[int]]]:
        """Choose each row's next token; (slot, new tokens) of the rows that end with it."""
        live_S, place_S1 = self.limit_S > 0, self.written_S[:, None]
        uniform_S = self.uniform_SN.gather(1, place_S1)[:, 0]
        self.token_S = token_S = choose(logits_SV, uniform_S, job.temperature)
        self.out_SN.scatter_(1, place_S1, token_S[:, None])
        self.written_S = self.written_S + 1
        ended_S = (self.written_S >= self.limit_S) | torch.isin(token_S, self.ends) | (token_S < 0)
        if job.stopped is not None:
            known_S = token_S.clamp(min=0)  # -1, where there is none, is no token to look up
            self.tail_ST = torch.cat([self.tail_ST[:, 1:], known_S[:, None]], 1)
            ended_S |= job.stopped(self.tail_ST, None)
        ended_S &= live_S
        slots = ended_S.nonzero()[:, 0].tolist()
        lengths = self.written_S[slots].tolist()
        found = [(s, self.out_SN[s, :n].tolist()) for s, n in zip(slots, lengths, strict=True)]
        if any(tokens[-1] < 0 for _, tokens in found):
            raise NotFiniteError(
                "the model's logits are not numbers (NaN), so it can write nothing; "
                "check its weights, or set model.dtype to float32"
            )
        self.limit_S[slots] = 0
        self.written_S *= self.limit_S > 0
        return found


def _write_by_generate(
    lm: PreTrainedModel, job: Job, count: int
) -> Iterator[tuple[int, list[int]]]:
    """The same by transformers' `generate`, for memories that are not keys and values.

    Prompts of one length at a time: not every recurrent model heeds a mask over padding.
    """
    order = sorted(job.rows(), key=lambda i: (-len(job.prompts[i]), -job.limits[i], i))
    theirs = lm.generation_config
    # what a config given to generate() leaves out is filled in from the model's own
    lm.generation_config = GenerationConfig()
    try:
        for _, group in groupby(order, key=lambda i: len(job.prompts[i])):
            members = list(group)
            for begin in range(0, len(members), count):
                rows = members[begin : begin + count]
                ids = torch.tensor([job.prompts[row] for row in rows], device=lm.device)
                desk = _Desk.empty(len(rows), job, lm.device)
                for slot, row in enumerate(rows):
                    desk.seat(slot, row, job)
                hook = _Hook(desk, job)
                lm.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    generation_config=GenerationConfig(
                        max_new_tokens=max(job.limits[row] for row in rows), pad_token_id=job.pad
                    ),
                    logits_processor=LogitsProcessorList([hook]),
                    stopping_criteria=StoppingCriteriaList([hook.ended]),
                )
                for slot, tokens in hook.found:
                    yield rows[slot], tokens
    finally:
        lm.generation_config = theirs


class _Hook(LogitsProcessor):
    """Lets the desk choose each token, and tells generate() which rows have ended."""

    def __init__(self, desk: _Desk, job: Job) -> None:
        self.desk, self.job = desk, job
        self.found: list[tuple[int, list[int]]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """All but the chosen token ruled out."""
        self.found += self.desk.take(scores, self.job)
        ruled_out = torch.full_like(scores, -torch.inf)
        return ruled_out.scatter(1, self.desk.token_S[:, None], 0.0)

    def ended(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """(B,) True for rows that have ended."""
        return self.desk.limit_S == 0
