"""Recovery: after a fall, is the capability back after about ten examples?

Much of what looks forgotten is lost alignment, not lost knowledge, and comes back after a few
examples of the old kind (arXiv 2501.13453). So a *copy* of the trained part takes a few steps on
them, and the fallen items are asked again. What comes back was not lost; what does not, was, or
takes more than that. The examples are probe items tagged `recovery`, which no probe reads.

The copy is the trained tensors alone, with AdamW's two moments: the originals are put aside and
never written to, so that the model is afterwards what it was, bit for bit, whatever happens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from holdfast import model as models
from holdfast.errors import RequestError
from holdfast.gate.stats import paired_difference
from holdfast.meters import Reading
from holdfast.meters.batches import batches
from holdfast.meters.likelihood import Question
from holdfast.meters.probes import Item
from holdfast.meters.probes.encode import encode_items
from holdfast.meters.probes.items import GENERATED
from holdfast.meters.scoring import Scored

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from holdfast.data.example import Example

Score = Callable[[Any], Sequence[Reading]]
"""Reads the probes of a model, such as `lambda m: read_probes(m, tokenizer, items, step)`."""

EPOCHS = 5
"""Times that the examples are seen: each time is one step."""
RATES = {"adapter": 2e-4, "full": 1e-5}
"""Learning rates, the upper ends of the usual ranges for an adapter and for all weights."""


def fallen(before: Iterable[Reading], after: Iterable[Reading]) -> dict[str, list[str]]:
    """Items (by probe) that the base had right and the tuned model has not; of accuracies only."""
    then = {r.name: r.items for r in before if r.meter == "probe" and r.unit == "accuracy"}
    found = {
        reading.name: [
            key for key, value in reading.items.items() if value < then[reading.name].get(key, 0.0)
        ]
        for reading in after
        if reading.meter == "probe" and reading.name in then
    }
    return {probe: items for probe, items in found.items() if items}


def recovery_examples(
    items: Iterable[Item], tokenizer: PreTrainedTokenizerBase, config: Any
) -> list[Example]:
    """The items tagged `recovery` as rows to learn: prompt, right answer, and what ends it.

    A written answer ends with its first stop string, in a chat with EOS.

    Raises:
        RequestError: an item has no answer that is written out, or is longer than the context.
    """
    from holdfast.data.example import Example

    asked = [_written_out(item) for item in items if "recovery" in item.tags]
    found = []
    for item, encoded in zip(asked, encode_items(tokenizer, asked, config), strict=True):
        (question,) = encoded
        assert isinstance(question, Question)
        response = [*question.continuations[0]]
        if not isinstance(item.prompt, str) and tokenizer.eos_token_id is not None:
            response.append(tokenizer.eos_token_id)
        prompt = [*question.context]
        found.append(
            Example(prompt + response, [False] * len(prompt) + [True] * len(response), item.probe)
        )
    return found


def _written_out(item: Item) -> Item:
    """The same as one continuation of its prompt."""
    if not item.targets:
        raise RequestError(
            f"{item.where}: a recovery item of kind {item.kind} has no answer to learn from; make "
            'it one of kind exact, with a target such as "target": " 4"'
        )
    written = item.kind in GENERATED and isinstance(item.prompt, str)
    prompt = item.prompt if item.prompts is None else item.prompts[item.answer or 0]
    target = item.delimiter + item.targets[0] + (item.stop[0] if written and item.stop else "")
    plain = {"choices": None, "prompts": None, "prompt": prompt}
    return item.model_copy(update={"kind": "cloze", "target": target, "delimiter": "", **plain})


def read_recovery(
    model: Any,
    examples: Sequence[Example],
    score: Score,
    *,
    epochs: int = EPOCHS,
    learning_rate: float | None = None,
    batch_tokens: int = 2048,
) -> list[Reading]:
    """For each probe that `score` reads: `PROBE/before`, `PROBE/after` and `PROBE/gain`.

    The gain is paired item by item, with the error of `gate.stats`.

    Args:
        model: the tuned model. What takes a gradient is trained; all of it, where nothing does.
        examples: about ten rows of the old kind (`recovery_examples`).
        score: reads the fallen items (`fallen`). Chosen for being wrong, they are at 0 before, and
            the base is at 1; items at the border come back by chance too, so ask as many that
            stood near it, or all of the probe, before a small gain is believed.
        epochs: passes over the examples, a step each.
        learning_rate: AdamW's; None: by what is trained (`RATES`).
        batch_tokens: padded tokens of one forward and backward pass.

    Raises:
        RequestError: there is nothing to learn from, or the loss is not a number.
    """
    if not any(any(example.loss_mask[1:]) for example in examples):
        raise RequestError(
            "recovery: no example has a token to learn; give about 10 rows of the kind that fell, "
            "with responses"
        )
    before = score(model)
    started = time.perf_counter()
    with borrowed(model) as trained:
        _learn(model, trained, examples, epochs, learning_rate, batch_tokens)
        seconds = time.perf_counter() - started
        after = score(model)
    then = {(r.meter, r.name): r for r in before}
    found = []
    for reading in after:
        base = then[reading.meter, reading.name]
        named = replace(reading, meter="recovery", tags=("recovery",))
        found += [
            replace(named, name=f"{reading.name}/before", value=base.value, stderr=base.stderr,
                    items=base.items, answers=base.answers, seconds=base.seconds),
            replace(named, name=f"{reading.name}/after", seconds=reading.seconds + seconds),
        ]  # fmt: skip
        if reading.items:
            found.append(_gain(base, named))
    return found


def _gain(before: Reading, after: Reading) -> Reading:
    keys = list(after.items)
    gain = paired_difference(
        [before.items[key] for key in keys],
        [after.items[key] for key in keys],
        clusters=[after.clusters.get(key, key) for key in keys],
        bounded=after.unit == "accuracy",
    )
    return replace(
        after,
        name=f"{after.name}/gain",
        value=gain.estimate,
        stderr=gain.stderr,
        items={key: after.items[key] - before.items[key] for key in keys},
        answers={},
        seconds=0.0,
    )


@contextmanager
def borrowed(model: Any) -> Iterator[list[Any]]:
    """Within, the trained tensors are copies, which may be written to; modes and gradients too."""
    parameters = list(model.parameters())
    asked = [p.requires_grad for p in parameters]
    trained = [p for p in parameters if p.requires_grad] or [
        p for p in parameters if p.is_floating_point()
    ]
    kept = [(p, p.data, p.grad) for p in trained]
    modes = {module: module.training for module in model.modules()}
    try:
        for parameter, data, _ in kept:
            parameter.data, parameter.grad = data.clone(), None
            parameter.requires_grad_(True)
        yield trained
    finally:
        for parameter, data, grad in kept:
            parameter.data = data
            parameter.grad = grad
        for parameter, wanted in zip(parameters, asked, strict=True):
            parameter.requires_grad_(wanted)
        for module, mode in modes.items():
            module.training = mode


def _learn(
    model: Any,
    trained: Sequence[Any],
    examples: Sequence[Example],
    epochs: int,
    learning_rate: float | None,
    batch_tokens: int,
) -> None:
    """One AdamW step an epoch, on the mean loss of all response tokens; without dropout."""
    import torch

    from holdfast.objective import token_nll

    if learning_rate is None:
        part = sum(p.numel() for p in trained) / sum(p.numel() for p in model.parameters())
        learning_rate = RATES["full" if part > 0.5 else "adapter"]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    texts = [Scored(list(e.input_ids), list(e.loss_mask)) for e in examples]
    count = sum(sum(text.loss_mask[1:]) for text in texts)
    model.eval()
    for _ in range(epochs):
        optimizer.zero_grad()
        total = 0.0
        with torch.enable_grad():
            for batch in batches(texts, models.causal_lm(model).device, batch_tokens):
                hidden = models.hidden_states(model, batch.ids_BW, batch.positions_BW)
                targets = batch.ids_BW.roll(-1, 1)[batch.scored_BW]
                nll = token_nll(hidden[batch.scored_BW], models.head(model), targets)
                loss = nll.sum() / count
                torch.autograd.backward(loss)
                total += float(loss.detach())
        if not math.isfinite(total):
            raise RequestError(
                f"recovery: the loss on the examples is {total}; check the model's weights, or "
                "set model.dtype to float32"
            )
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
