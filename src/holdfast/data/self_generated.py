"""Text that the base writes itself: anchor rows, and a canary where the user has none.

Sampled from the model's own start, temperature 1, no truncation of the distribution (arXiv
2505.13811): a base model starts from BOS; a chat model is led to the point where a user would
speak, so that it writes the question, and then answers it. Generated once, kept, read ever after.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast import model as models
from holdfast.data.example import Example, Role
from holdfast.data.stream import Stream
from holdfast.errors import RequestError
from holdfast.files import write_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH = 64
"""Rows sampled side by side."""
MARK = "\ue000"
"""A private-use character that no template contains: marks where the user's words would stand."""


def generate_stream(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str,
    share: float,
    rows: int,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    folder: Path,
) -> Stream:
    """Anchor rows as a stream; see `generate`."""
    examples = generate(
        model,
        tokenizer,
        rows=rows,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        keep=folder / f"{name}.json",
    )
    return Stream.of(name, Role.ANCHOR, share, examples)


def generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    rows: int,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    keep: Path,
    progress: Callable[[int], None] = lambda _rows: None,
) -> list[Example]:
    """Sample `rows` texts from the model as it stands (an adapter, if any, must still be neutral).

    Args:
        max_new_tokens: a row has one token more at most; in a chat, the template's own tokens,
            question and answer share them.
        temperature: 1 is the model's own distribution.
        seed: seeds the sampling; the global generators are left as they were.
        keep: JSON file that holds the rows, read back when it was made with the same settings.
        progress: called with the number of rows done.

    Raises:
        RequestError: the tokenizer has no token to start from, or the chat template leaves no room.
    """
    settings = {
        "rows": rows,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "seed": seed,
        "prefix": _start(tokenizer)[0],
    }
    if keep.is_file():
        kept = json.loads(keep.read_text(encoding="utf-8"))
        if kept["settings"] == settings:
            return [Example(ids, mask, "self_generated") for ids, mask in kept["rows"]]
    import torch

    devices = [model.device.index] if model.device.type == "cuda" else []
    texts: list[tuple[list[int], list[bool]]] = []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        while len(texts) < rows:
            count = min(BATCH, rows - len(texts))
            texts += _sample_rows(model, tokenizer, count, max_new_tokens, temperature)
            progress(len(texts))
    keep.parent.mkdir(parents=True, exist_ok=True)
    write_text(keep, json.dumps({"settings": settings, "rows": texts}))
    return [Example(ids, mask, "self_generated") for ids, mask in texts]


def _start(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], bool]:
    """Tokens that stand before the first sampled one, and whether a user's words follow them."""
    if tokenizer.chat_template is not None:
        text: str = tokenizer.apply_chat_template(
            [{"role": "user", "content": MARK}], tokenize=False
        )
        before, found, _ = text.partition(MARK)
        if found and before:
            return tokenizer(before, add_special_tokens=False)["input_ids"], True
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return [token], False
    raise RequestError(
        "the tokenizer has neither BOS nor EOS token to start a text from; give replay.sources "
        "and set levers.kl_anchor.self_generated.fraction to 0"
    )


def _sample_rows(
    model: Any, tokenizer: Any, count: int, max_new_tokens: int, temperature: float
) -> list[tuple[list[int], list[bool]]]:
    start, chat = _start(tokenizer)
    written = partial(models.write_on, model, tokenizer, temperature=temperature)
    rows = [start] * count
    longest = max_new_tokens + 1
    if chat:
        room = longest - len(start)
        if room < 4:
            raise RequestError(
                f"the chat template opens with {len(start)} tokens, which leaves no room in "
                f"self-generated rows of {longest}; raise data.max_length, or "
                "levers.kl_anchor.self_generated.max_new_tokens"
            )
        questions = written(rows, max_new_tokens=room // 4)
        rows = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": question.strip()}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
            )["input_ids"]
            for question in tokenizer.batch_decode(questions, skip_special_tokens=True)
        ]
    answers = written(rows, max_new_tokens=max(1, longest - min(map(len, rows))))
    whole = [(row + answer)[:longest] for row, answer in zip(rows, answers, strict=True)]
    return [(ids, [i >= len(start) for i in range(len(ids))]) for ids in whole]
