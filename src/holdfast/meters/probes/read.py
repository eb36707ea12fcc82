"""A model's readings on probe items."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from holdfast.errors import NotFiniteError, RequestError
from holdfast.gate.stats import stderr_of_mean
from holdfast.meters import Reading, Split
from holdfast.meters.likelihood import Likelihood, Question, likelihoods
from holdfast.meters.probes.encode import Encoded, encode_items
from holdfast.meters.probes.grade import is_right
from holdfast.meters.probes.items import GENERATED, Item
from holdfast.meters.probes.results import Outcome, Results
from holdfast.meters.scoring import greedy
from holdfast.model import causal_lm

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from holdfast.meters.sandbox import Job


def read_probes(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Item],
    step: int,
    *,
    split: Split | None = None,
    results: Results | None = None,
    run_generated_code: bool = False,
) -> list[Reading]:
    """One reading a probe: accuracy (0..1), or nats for nll items.

    Args:
        model: in any mode; it is left as it was.
        tokenizer: the model's own.
        items: those tagged `recovery` are practised on elsewhere, and left out.
        step: optimizer steps taken.
        split: the half that is read; None: all items, as sealed, where nothing chooses by them.
        results: where results are looked up and stored; those of code never are.
        run_generated_code: run what the model writes for code items, in a sandbox.

    Raises:
        RequestError: a code item that was not asked for by name, an item that the model cannot
            take, logits that are not numbers; before anything is read where it can be told.
    """
    groups: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        if "recovery" not in item.tags and split in (None, item.split):
            groups[item.probe].append(item)
    allow_code(items, run_generated_code)
    chosen = [item for _, group in sorted(groups.items()) for item in group]
    encoded = iter(encode_items(tokenizer, chosen, causal_lm(model).config))
    readings = []
    for probe, group in sorted(groups.items()):
        started = time.perf_counter()
        tokens = [next(encoded) for _ in group]
        kept = results if group[0].kind != "code" else None
        outcome = kept.find(group) if kept is not None else None
        if outcome is None:
            try:
                outcome = _read(model, tokenizer, group, tokens)
            except NotFiniteError:  # a reading like any other, which no gate lets pass
                outcome = Outcome([math.nan] * len(group), None)
            else:
                if kept is not None:
                    kept.store(group, outcome)
        seconds = time.perf_counter() - started
        readings.append(_reading(probe, group, outcome, step, split or "sealed", seconds))
    return readings


def allow_code(items: Sequence[Item], asked_for: bool) -> None:
    """Raises RequestError where there is code to run that nobody asked for, or no sandbox."""
    code = next((item for item in items if item.kind == "code"), None)
    if code is None:
        return
    if not asked_for:
        raise RequestError(
            f"{code.where}: a code item runs what the model writes, which is not done unless asked "
            "for by name; give run_generated_code, or leave these items out"
        )
    from holdfast.meters.sandbox import run_code

    run_code("", allowed=True)  # that bwrap is there does not say that it may make a sandbox


def _read(model: Any, tokenizer: Any, items: list[Item], tokens: list[Encoded]) -> Outcome:
    if items[0].kind not in GENERATED:
        return _likely(model, items, tokens)
    answers = _written(model, tokenizer, items, tokens)
    if items[0].kind == "code":
        from holdfast.meters.sandbox import run_all

        jobs = [_job(item, answer) for item, answer in zip(items, answers, strict=True)]
        return Outcome([float(o.passed) for o in run_all(jobs, allowed=True)], answers)
    right = [float(is_right(item, answer)) for item, answer in zip(items, answers, strict=True)]
    return Outcome(right, answers)


def _likely(model: Any, items: list[Item], tokens: list[Encoded]) -> Outcome:
    """Of choice, cloze and nll items."""
    asked = [q for questions in tokens for q in questions if isinstance(q, Question)]
    found = iter(likelihoods(model, asked))
    per_item = [[answer for _ in questions for answer in next(found)] for questions in tokens]
    if items[0].kind == "choice":
        taken = [choose(item, said) for item, said in zip(items, per_item, strict=True)]
        values = [float(n == item.answer) for n, item in zip(taken, items, strict=True)]
        return Outcome(values, [(i.choices or [])[n] for n, i in zip(taken, items, strict=True)])
    if items[0].kind == "cloze":
        return Outcome([float(said[0].greedy) for said in per_item], None)
    return Outcome([-said[0].logp / said[0].tokens for said in per_item], None)


def choose(item: Item, said: Sequence[Likelihood]) -> int:
    """The choice of highest log-likelihood by its length; of equal ones the first."""
    choices = item.choices or []
    lengths = {
        "tokens": [one.tokens for one in said],
        "none": [1] * len(said),
        "characters": [len(choice) for choice in choices],
        "bytes": [len(choice.encode()) for choice in choices],
    }[item.norm]
    scores = [one.logp / length for one, length in zip(said, lengths, strict=True)]
    return max(range(len(scores)), key=scores.__getitem__)


def _written(model: Any, tokenizer: Any, items: list[Item], tokens: list[Encoded]) -> list[str]:
    """What the model writes for each item, those of the same stop strings together."""
    answers = [""] * len(items)
    groups: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for i, item in enumerate(items):
        groups[tuple(item.stop)].append(i)
    for stop, members in groups.items():
        written = greedy(
            model,
            tokenizer,
            [[t for t in tokens[i] if isinstance(t, int)] for i in members],
            max_new_tokens=[items[i].max_new_tokens for i in members],
            stop=stop,
        )
        for i, answer in zip(members, written, strict=True):
            answers[i] = answer
    return answers


def _job(item: Item, answer: str) -> Job:
    """The prompt's text goes on in the answer; a chat's answer is the whole program."""
    from holdfast.meters.sandbox import Job

    begun = item.prompt if isinstance(item.prompt, str) else ""
    return Job(begun + answer, item.tests or "")


def _reading(
    probe: str, items: list[Item], outcome: Outcome, step: int, split: Split, seconds: float
) -> Reading:
    values = outcome.values
    names = [item.id for item in items]
    clusters = {item.id: item.cluster or item.id for item in items}
    return Reading(
        meter="probe",
        name=probe,
        split=split,
        step=step,
        value=sum(values) / len(values),
        stderr=stderr_of_mean(values, list(clusters.values())),
        n=len(values),
        unit=items[0].unit,
        seconds=seconds,
        tags=tuple(sorted({tag for item in items for tag in item.tags})),
        items=dict(zip(names, values, strict=True)),
        clusters=clusters,
        answers=dict(zip(names, outcome.answers or [], strict=outcome.answers is not None)),
    )
