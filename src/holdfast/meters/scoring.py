"""The two things meters ask of a model: the likelihood of given tokens, and a greedy answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from holdfast import model as models

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH_TOKENS = 8192
"""Padded tokens in one forward pass of a meter."""


@dataclass(frozen=True)
class Scored:
    """Tokens of one text, and which of them are scored."""

    input_ids: list[int]
    loss_mask: list[bool]


def mean_nlls(model: Any, texts: Sequence[Scored]) -> list[float]:
    """Mean negative log-likelihood (nats a token) over the masked tokens of each text, in order."""
    import torch

    from holdfast.objective import token_nll

    result = [0.0] * len(texts)
    training = model.training
    model.eval()
    with torch.inference_mode():
        for batch in _batches([len(text.input_ids) for text in texts], BATCH_TOKENS):
            width = max(len(texts[i].input_ids) for i in batch)
            ids = torch.zeros(len(batch), width, dtype=torch.long)
            mask = torch.zeros(len(batch), width, dtype=torch.bool)
            for row, i in enumerate(batch):
                length = len(texts[i].input_ids)
                ids[row, :length] = torch.tensor(texts[i].input_ids)
                mask[row, :length] = torch.tensor(texts[i].loss_mask)
            ids, mask = ids.to(model.device), mask.to(model.device)
            positions = torch.arange(width, device=model.device).expand(len(batch), -1)
            # right padding: a causal model never looks at it
            hidden_BWH = models.hidden_states(model, ids, positions)[:, :-1]
            scored = mask[:, 1:]
            nll_N = token_nll(hidden_BWH[scored], models.head(model), ids[:, 1:][scored])
            parts = torch.split(nll_N.double(), scored.sum(1).tolist())
            for i, part in zip(batch, parts, strict=True):
                result[i] = float(part.mean()) if len(part) else float("nan")
    model.train(training)
    return result


def greedy(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    stop: Sequence[str],
) -> list[str]:
    """Greedy continuation of each prompt (token ids), cut before the first stop string."""
    result = [""] * len(prompts)
    for batch in _batches([len(p) + max_new_tokens for p in prompts], BATCH_TOKENS):
        answers = models.write_on(
            model,
            tokenizer,
            [prompts[i] for i in batch],
            max_new_tokens=max_new_tokens,
            stop=stop,
        )
        for i, answer in zip(batch, answers, strict=True):
            text: str = tokenizer.decode(answer, skip_special_tokens=True)
            for marker in stop:
                text = text.split(marker, 1)[0]
            result[i] = text
    return result


def _batches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Indices, longest first, grouped so that rows x longest stays within the budget."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batch: list[int] = []
    for i in order:
        if batch and lengths[batch[0]] * (len(batch) + 1) > budget:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
