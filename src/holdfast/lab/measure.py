"""What a base knows: its loss on held-out text of every domain and its answers to probes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from holdfast.gate.stats import stderr_of_mean
from holdfast.lab.corpus import Document
from holdfast.lab.domain import Item
from holdfast.lab.tokenizer import encode_document
from holdfast.meters import probes
from holdfast.meters.scoring import Scored, mean_nlls

Figures = dict[str, dict[str, Any]]
"""By name: a value, its standard error, and how many items or documents are behind it."""


def measure(
    folder: Path, items: Sequence[Item], documents: Sequence[Document]
) -> dict[str, Figures]:
    """Measure a saved base, in single precision.

    `probes` are accuracies (nats a token for those of kind `nll`), `validation_nats` are nats a
    token by domain, a document's mean being one observation.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    readings = probes.read_probes(
        model, tokenizer, [probes.Item.model_validate(item) for item in items], step=0
    )
    return {
        "validation_nats": _validation(model, tokenizer, documents),
        "probes": {r.name: _figure(r.value, r.stderr, r.n) for r in readings},
    }


def _validation(model: Any, tokenizer: Any, documents: Sequence[Document]) -> Figures:
    texts = [encode_document(tokenizer, document.text) for document in documents]
    scored = [Scored(ids, [False] + [True] * (len(ids) - 1)) for ids in texts]
    nats: dict[str, list[float]] = {}
    for document, value in zip(documents, mean_nlls(model, scored), strict=True):
        nats.setdefault(document.domain, []).append(value)
    return {
        domain: _figure(sum(values) / len(values), stderr_of_mean(values), len(values))
        for domain, values in nats.items()
    }


def _figure(value: float, stderr: float | None, n: int) -> dict[str, Any]:
    error = None if stderr is None or math.isnan(stderr) else round(stderr, 4)
    return {"value": round(value, 4), "stderr": error, "n": n}
