"""Pretraining of the lab's base, from its corpus and from nothing else.

The embedded base was made by `pretrain(base_path(), steps=1600)`.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
)

from holdfast.lab.batches import IGNORED, pack
from holdfast.lab.corpus import corpus
from holdfast.lab.domain import Item
from holdfast.lab.files import canaries, probe_items
from holdfast.lab.measure import measure
from holdfast.lab.tokenizer import encode_document, train_tokenizer

ROW = 256
"""Tokens in a row; every document is shorter."""
PEAK_RATE = 3e-3
TOKENIZER_DOCUMENTS = 8000


@dataclass(frozen=True)
class Shape:
    """The size of a base."""

    vocabulary: int = 2048
    hidden: int = 256
    layers: int = 4
    heads: int = 8
    key_value_heads: int = 4
    intermediate: int = 704


def pretrain(
    out: Path,
    *,
    steps: int,
    batch_tokens: int = 4096,
    seed: int = 0,
    progress: Callable[[str], None] = print,
    shape: Shape = Shape(),
    items: Sequence[Item] | None = None,
) -> None:
    """Train a base from scratch and write it to `out`, a folder that must not exist yet.

    Beside the model lies `base.json`: how it was trained and what it was measured to know, on
    the probe `items` (all the lab's probes where none are given) and on canary documents.  The
    same arguments give the same weights, bit for bit, on the same machine with the same number
    of threads.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists already: a base is never overwritten")
    if batch_tokens < ROW:
        raise ValueError(f"batch_tokens is {batch_tokens}: a step takes at least a row of {ROW}")
    texts = (document.text for document in corpus(seed, "train"))
    tokenizer = train_tokenizer(
        itertools.islice(texts, TOKENIZER_DOCUMENTS), vocabulary=shape.vocabulary
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(_config(shape, tokenizer))
    written: Counter[str] = Counter()
    documents = _encoded(tokenizer, seed, written)
    tokens = _train(model, documents, steps=steps, rows=batch_tokens // ROW, progress=progress)

    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.half().save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    record = {
        "seed": seed,
        "steps": steps,
        "batch_tokens": batch_tokens,
        "tokens": tokens,
        "parameters": model.num_parameters(),
        "proportions": {name: round(n / written.total(), 4) for name, n in written.items()},
        **measure(partial, probe_items(seed) if items is None else items, canaries(seed)),
    }
    (partial / "base.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    for file in partial.iterdir():
        file.chmod(0o644)
    partial.rename(out)


def _config(shape: Shape, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        intermediate_size=shape.intermediate,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def _encoded(
    tokenizer: PreTrainedTokenizerFast, seed: int, written: Counter[str]
) -> Iterator[list[int]]:
    """Encode the training corpus, counting the tokens of each domain in `written`."""
    for document in corpus(seed, "train"):
        tokens = encode_document(tokenizer, document.text)
        written[document.domain] += len(tokens)
        yield tokens


def _train(
    model: LlamaForCausalLM,
    documents: Iterator[list[int]],
    *,
    steps: int,
    rows: int,
    progress: Callable[[str], None],
) -> int:
    """Run the optimiser and say how many tokens the model learnt to predict."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.95), fused=True)
    schedule = get_cosine_schedule_with_warmup(optimiser, max(1, steps // 20), steps)
    batches = pack(documents, rows=rows, width=ROW, pad=model.config.pad_token_id)
    model.train()
    tokens = 0
    for step, batch in enumerate(itertools.islice(batches, steps), start=1):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            # Without a cache, positions that start over are what keeps documents apart.
            loss = model(**batch._asdict(), use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        tokens += int((batch.labels != IGNORED).sum())
        if step % 20 == 0 or step == steps:
            progress(f"step {step}/{steps}: {tokens} tokens, loss {loss.item():.3f}")
    return tokens
