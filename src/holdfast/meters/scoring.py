"""The two things meters ask of a model: the likelihood of given tokens, and a greedy answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from holdfast import model as models

if TYPE_CHECKING:
    import torch
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
    return [float(nll.mean()) if len(nll) else float("nan") for nll in token_nlls(model, texts)]


def token_nlls(model: Any, texts: Sequence[Scored]) -> list[torch.Tensor]:
    """Negative log-likelihood (nats) of each masked token of each text: float64, on the CPU."""
    import torch

    from holdfast.objective import token_nll

    result = [torch.empty(0)] * len(texts)
    training = model.training
    model.eval()
    with torch.inference_mode():
        for batch in token_batches([len(text.input_ids) for text in texts], BATCH_TOKENS):
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
            parts = torch.split(nll_N.double().cpu(), scored.sum(1).tolist())
            for i, part in zip(batch, parts, strict=True):
                result[i] = part
    model.train(training)
    return result


def greedy(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int | Sequence[int],
    stop: Sequence[str],
) -> list[str]:
    """Greedy continuation of each prompt (token ids), cut before the first stop string in it."""
    from holdfast.decode import write_on

    result = []
    answers = write_on(
        model,
        tokenizer,
        prompts,
        max_new_tokens=max_new_tokens,
        stop=stop,
        stop_in_prompt=False,
    )
    for prompt, answer in zip(prompts, answers, strict=True):
        text = _after(prompt, answer, tokenizer)
        for marker in stop:
            text = text.split(marker, 1)[0]
        result.append(text)
    return result


def _after(prompt: list[int], answer: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """What an answer adds to its prompt's text.

    Decoded alone it could lose a space: SentencePiece takes one off the beginning of a text, and of
    code that breaks the indentation.
    """
    begun, whole, alone = (
        str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        for ids in (prompt, prompt + answer, answer)
    )
    return whole.removeprefix(begun) if whole.startswith(begun) else alone


def token_batches(
    lengths: Sequence[int], budget: int, most_rows: int = 2**31
) -> Iterator[list[int]]:
    """Indices, longest first, grouped so that rows x longest stays within the budget."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batch: list[int] = []
    for i in order:
        full = batch and lengths[batch[0]] * (len(batch) + 1) > budget
        if full or len(batch) == most_rows:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
