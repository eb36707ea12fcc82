"""Log-likelihoods of continuations: what their contexts have in common is computed once.

Shapes: B rows of a batch, W positions in a row, P of the prefix, U positions with a scored token,
H hidden size, V vocabulary.

A row is one context without the prefix, then its continuations side by side:

    prefix (keys and values, once for all rows) | context | continuation 1 | continuation 2 | ...

A token sees the prefix, its context and its own continuation, at the position it would have alone.
The last token of a continuation is only predicted, so that choices of one token cost nothing.

Whether an architecture heeds such a mask is found by trying, and a sliding window must hold the
whole text; where it does not, each continuation has a row of its own, as in lm-eval.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from holdfast import model as models
from holdfast.errors import NotFiniteError, RequestError
from holdfast.meters.scoring import BATCH_TOKENS, token_batches

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from holdfast.slots import Past

CACHE_BYTES = 2**31
"""Keys and values of a batch."""
LOGIT_BYTES = 2**26
"""fp32 logits that live at a time."""
PASS_TOKENS = 1024
"""What one more forward pass costs on an accelerator, in tokens that it could have read."""
CPU_PASS_TOKENS = 64
"""The same on a CPU."""
DEEPEST = 100
"""Prefixes within prefixes that are looked at."""


@dataclass(frozen=True)
class Question:
    """A context and what may follow it, as token ids: at least one token each."""

    context: list[int]
    continuations: list[list[int]]

    @property
    def width(self) -> int:
        """Positions of its row."""
        return len(self.context) + sum(len(tokens) - 1 for tokens in self.continuations)

    @property
    def branches(self) -> bool:
        """Whether its row holds continuations that must not see each other."""
        return sum(len(tokens) > 1 for tokens in self.continuations) > 1


@dataclass(frozen=True)
class Likelihood:
    """What a model says of a continuation."""

    logp: float
    """Nats, the sum over its tokens."""
    greedy: bool
    """Whether each token is the likeliest one."""
    tokens: int


def likelihoods(
    model: Any, questions: Sequence[Question], *, batch_tokens: int = BATCH_TOKENS
) -> list[list[Likelihood]]:
    """The log-likelihood of each continuation after its context.

    Args:
        questions: in any order; the answer is in the same.
        batch_tokens: padded tokens in one forward pass.

    Raises:
        RequestError: the logits are not numbers.
    """
    import torch

    found: list[dict[int, Likelihood]] = [{} for _ in questions]
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            longest = _longest_shared(model) if questions else 0
            parts = [
                (number, chosen, part)
                for number, question in enumerate(questions)
                for chosen, part in _parts(question, longest)
            ]
            answers = _answers(model, [part for *_, part in parts], batch_tokens, longest)
            for (number, chosen, _), answer in zip(parts, answers, strict=True):
                found[number].update(zip(chosen, answer, strict=True))
    finally:
        model.train(training)
    return [[answers[i] for i in range(len(answers))] for answers in found]


def _parts(question: Question, longest: int) -> list[tuple[list[int], Question]]:
    """Rows that the model can read, with their continuations' numbers: one where it can share."""
    numbers = range(len(question.continuations))
    length = len(question.context) + max(map(len, question.continuations)) - 1
    if length <= longest or not question.branches:
        return [(list(numbers), question)]
    short = [i for i in numbers if len(question.continuations[i]) == 1]
    rows = [[i] for i in numbers if i not in short] + ([short] if short else [])
    return [
        (row, Question(question.context, [question.continuations[i] for i in row])) for row in rows
    ]


def _answers(
    model: Any, questions: Sequence[Question], batch_tokens: int, longest: int
) -> list[list[Likelihood]]:
    """Of each question's continuations; texts share what they begin with unless `longest` is 0."""
    import torch

    from holdfast.slots import read

    lm = models.causal_lm(model)
    found: list[list[Likelihood]] = [[] for _ in questions]
    cost = CPU_PASS_TOKENS if lm.device.type == "cpu" else PASS_TOKENS
    contexts = [question.context for question in questions]
    for numbers, length in groups(contexts, cost) if longest else _ungrouped(contexts):
        prefix: Past = []
        if length:
            ids = torch.tensor([contexts[numbers[0]][:length]], device=lm.device)
            prefix = read(lm, ids, [])
        widths = [questions[number].width - length for number in numbers]
        for batch in token_batches(widths, batch_tokens, _most_rows(prefix, max(widths))):
            rows = [_Row.of(questions[numbers[i]], length) for i in batch]
            hidden_UH, wanted = _read(model, rows, prefix, length, longest)
            for i, row_answers in zip(batch, _score(model, hidden_UH, wanted, rows), strict=True):
                found[numbers[i]] = row_answers
    return found


def _ungrouped(contexts: Sequence[list[int]]) -> list[tuple[list[int], int]]:
    return [(list(range(len(contexts))), 0)] if contexts else []


def _most_rows(prefix: Past, width: int) -> int:
    """Rows whose keys and values `CACHE_BYTES` hold."""
    if not prefix:
        return 2**31
    length = prefix[0][0].shape[2]
    token_bytes = sum(p.numel() * p.element_size() for layer in prefix for p in layer) / length
    return max(1, int(CACHE_BYTES / (token_bytes * (length + width))))


def groups(contexts: Sequence[list[int]], cost: int) -> list[tuple[list[int], int]]:
    """Which contexts to read behind one prefix, and how long it is.

    A group of n saves (n - 1) prefixes and costs a pass over it; groups within groups are weighed
    against the whole. A prefix leaves each context its last token.
    """
    order = sorted(range(len(contexts)), key=contexts.__getitem__)
    shared = [
        min(_common(contexts[a], contexts[b]), len(contexts[a]) - 1, len(contexts[b]) - 1)
        for a, b in pairwise(order)
    ]

    def best(begin: int, end: int, depth: int) -> tuple[int, list[tuple[int, int, int]]]:
        """(tokens saved, [(begin, end, prefix)]) of a run of neighbours."""
        if end - begin < 2:
            return 0, []
        least = min(shared[begin : end - 1])
        saved, found = 0, list[tuple[int, int, int]]()
        if depth < DEEPEST:
            cuts = [i + 1 for i in range(begin, end - 1) if shared[i] == least]
            for left, right in pairwise([begin, *cuts, end]):
                more, parts = best(left, right, depth + 1)
                saved, found = saved + more, found + parts
        whole = (end - begin - 1) * least - cost
        return (whole, [(begin, end, least)]) if whole > saved else (saved, found)

    _, runs = best(0, len(order), 0)
    grouped = [(order[begin:end], length) for begin, end, length in runs]
    taken = {number for numbers, _ in grouped for number in numbers}
    alone = [number for number in order if number not in taken]
    return grouped + ([(alone, 0)] if alone else [])


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens that both begin with."""
    length = min(len(a), len(b))
    return next((i for i in range(length) if a[i] != b[i]), length)


@dataclass(frozen=True)
class _Row:
    """One question as the model reads it."""

    ids: list[int]
    positions: list[int]
    branch: list[int]
    """0 in the context and in an only continuation, else the continuation's number from 1."""
    wanted: list[tuple[int, int]]
    """(place in the row, token that it must predict), continuation by continuation."""
    lengths: list[int]

    @classmethod
    def of(cls, question: Question, prefix: int) -> _Row:
        ids = question.context[prefix:]
        row = cls(
            ids,
            list(range(prefix, prefix + len(ids))),
            [0] * len(ids),
            [],
            [len(tokens) for tokens in question.continuations],
        )
        last, after = len(ids) - 1, prefix + len(ids)
        for number, tokens in enumerate(question.continuations, start=1):
            begin = len(row.ids)
            places = [last, *range(begin, begin + len(tokens) - 1)]
            row.wanted.extend(zip(places, tokens, strict=True))
            row.ids.extend(tokens[:-1])
            row.positions.extend(range(after, after + len(tokens) - 1))
            row.branch.extend([number if question.branches else 0] * (len(tokens) - 1))
        return row


def _read(
    model: Any, rows: Sequence[_Row], prefix: Past, length: int, longest: int
) -> tuple[Tensor, list[tuple[int, int]]]:
    """Hidden states (U, H) where a token is predicted, and (which of U, token) for each token."""
    import torch

    lm = models.causal_lm(model)
    width = max(len(row.ids) for row in rows)

    def padded(values: list[list[int]], fill: int) -> Tensor:
        """(B, W), padded on the right, which a causal model never looks at."""
        full = [some + [fill] * (width - len(some)) for some in values]
        return torch.tensor(full, device=lm.device)

    ids_BW = padded([row.ids for row in rows], 0)
    positions_BW = padded([row.positions for row in rows], length)
    branch_BW = padded([row.branch for row in rows], 0)
    mask = None
    if int(branch_BW.max()):
        mask = _mask(branch_BW, length, lm.dtype)
    elif prefix and length + width <= longest:
        # transformers' own has a copy for each row, which a CPU reads at a third more time
        mask = _mask(branch_BW[:1], length, lm.dtype)
    if mask is None and not prefix:
        hidden_BWH = models.hidden_states(model, ids_BW, positions_BW)
    else:
        decoder: Any = lm.get_decoder()
        hidden_BWH = decoder(
            input_ids=ids_BW,
            attention_mask=mask,
            position_ids=positions_BW,
            past_key_values=_behind(prefix, len(rows)),
            use_cache=True,
        )[0]
    places: dict[tuple[int, int], int] = {}
    wanted = [
        (places.setdefault((number, place), len(places)), token)
        for number, row in enumerate(rows)
        for place, token in row.wanted
    ]
    rows_U, columns_U = torch.tensor(list(places), device=lm.device).T
    return hidden_BWH[rows_U, columns_U], wanted


def _mask(branch_BW: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """(B, 1, W, P + W): 0 where a token is seen, the least number where it is not.

    Of one row (B = 1) it serves a batch whose rows have no branches.
    """
    import torch

    width = branch_BW.shape[1]
    key_B1W, query_BW1 = branch_BW[:, None, :], branch_BW[:, :, None]
    causal_WW = torch.ones(width, width, dtype=torch.bool, device=branch_BW.device).tril()
    seen_BWW = causal_WW & ((key_B1W == 0) | (key_B1W == query_BW1))
    mask_BWK = torch.zeros(*seen_BWW.shape[:2], length + width, dtype=dtype, device=seen_BWW.device)
    mask_BWK[:, :, length:].masked_fill_(~seen_BWW, torch.finfo(dtype).min)
    return mask_BWK[:, None]


def _behind(prefix: Past, rows: int) -> Any:
    """A cache that begins with the prefix in each row: one copy, made when the row is read."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    cache = DynamicCache()
    for keys, values in prefix:
        layer = DynamicLayer()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = (part.expand(rows, -1, -1, -1) for part in (keys, values))
        cache.layers.append(layer)
    return cache


def _score(
    model: Any, hidden_UH: Tensor, wanted: list[tuple[int, int]], rows: Sequence[_Row]
) -> Iterator[list[Likelihood]]:
    """The answers of each row, from the logits of a chunk of positions at a time."""
    import torch

    head = models.head(model)
    chunk = max(1, LOGIT_BYTES // (4 * head.weight_VH.shape[0]))
    places_T, tokens_T = torch.tensor(wanted, device=hidden_UH.device).T
    logp_T = torch.empty(len(wanted), dtype=torch.float32, device=hidden_UH.device)
    greedy_T = torch.empty(len(wanted), dtype=torch.bool, device=hidden_UH.device)
    for begin in range(0, len(hidden_UH), chunk):
        logits_CV = head(hidden_UH[begin : begin + chunk])
        here_T = (places_T >= begin) & (places_T < begin + chunk)
        at, tokens = places_T[here_T] - begin, tokens_T[here_T]
        logp_T[here_T] = (logits_CV[at, tokens] - logits_CV.logsumexp(-1)[at]).float()
        greedy_T[here_T] = logits_CV.argmax(-1)[at] == tokens
    if bool(logp_T.isnan().any()):
        raise NotFiniteError(NOT_NUMBERS)
    logps, greedy = logp_T.double().tolist(), greedy_T.tolist()
    done = 0
    for row in rows:
        answers = []
        for tokens in row.lengths:
            part = slice(done, done + tokens)
            answers.append(Likelihood(sum(logps[part]), all(greedy[part]), tokens))
            done += tokens
        yield answers


NOT_NUMBERS = (
    "the model's logits are not numbers (NaN), so nothing can be read of it; check its weights, or "
    "set model.dtype to float32"
)


def _longest_shared(model: Any) -> int:
    """Tokens of the longest text whose parts may be shared; 0 where this architecture cannot.

    Tried with two questions behind one prefix, against rows of their own without any.
    """
    import torch

    from holdfast.slots import read

    lm = models.causal_lm(model)
    config = lm.config.get_text_config()
    tokens = [(3 * i + 1) % config.vocab_size for i in range(12)]
    questions = [
        Question(tokens[:5], [tokens[5:7], tokens[4:8], tokens[:1]]),
        Question(tokens[:3] + tokens[8:9], [tokens[7:10], tokens[9:12]]),
    ]
    try:
        prefix = read(lm, torch.tensor([tokens[:3]], device=lm.device), [])
        rows = [_Row.of(question, 3) for question in questions]
        found = list(_score(model, *_read(model, rows, prefix, 3, 0), rows))
        apart = [(i, *part) for i, question in enumerate(questions) for part in _parts(question, 0)]
        expected = _answers(model, [part for *_, part in apart], BATCH_TOKENS, 0)
    except RequestError:
        raise
    except Exception:  # whatever an architecture makes of a mask or a cache that is not its own
        return 0
    pairs = [
        (found[number][i].logp, answer.logp)
        for (number, chosen, _), answers in zip(apart, expected, strict=True)
        for i, answer in zip(chosen, answers, strict=True)
    ]
    near = 5e-2 if lm.dtype in (torch.bfloat16, torch.float16) else 1e-4
    if any(abs(ours - theirs) > near * max(1.0, abs(theirs)) for ours, theirs in pairs):
        return 0
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return min([w for w in windows if w], default=2**31)
