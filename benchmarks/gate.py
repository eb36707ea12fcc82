"""The gate's own error rates: how often it is wrong, and the smallest fall that it finds.

python benchmarks/gate.py simulate               # simulated runs only: about 2 minutes
python benchmarks/gate.py real --threads 2       # the lab's base: batches, bf16, planted noise
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import typer

from holdfast.gate.sequential import Evidence, alarms, update
from holdfast.gate.stats import paired_difference, stderr_of_mean
from holdfast.gate.verdict import Gate, GateResult, decide
from holdfast.meters import Reading

app = typer.Typer(add_completion=False)
ALPHA = 0.05
CHURN = 0.04
"""Share of 0/1 items that another batch size or precision changes, half of them to wrong."""
ACCURACY, NOISE = 0.7, 0.02
"""Of the simulated base: accuracy, and spread of a loss's change in nats."""


def probe(name: str, values: np.ndarray, unit: str = "accuracy") -> Reading:
    items = {str(i): float(v) for i, v in enumerate(values)}
    return Reading("probe", name, "sealed", 0, float(values.mean()), None, len(values), unit,
                   items=items)  # fmt: skip


def changed(rng: np.random.Generator, before: np.ndarray, churn: float, fall: float) -> np.ndarray:
    """0/1 scores of which `churn` turn over evenly and `fall` (of all) turn wrong beside."""
    to_wrong = (churn / 2 + fall) / ACCURACY
    to_right = churn / 2 / (1 - ACCURACY)
    draw = rng.random(before.shape)
    return np.where(before > 0, draw >= to_wrong, draw < to_right).astype(float)


def simulated(rng: np.random.Generator, items: int, fall: float, rise: float) -> GateResult:
    """Three accuracies and one loss, judged; `fall` in accuracy, `rise` relative, of each."""
    before, after = [], []
    for k in range(3):
        scores = (rng.random(items) < ACCURACY).astype(float)
        before.append(probe(f"probe{k}", scores))
        after.append(probe(f"probe{k}", changed(rng, scores, CHURN, fall)))
    nats = rng.gamma(8, 0.25, 100)
    before.append(probe("text", nats, "nats"))
    moved = nats * (1 + rise) + rng.normal(0, NOISE, 100)
    after.append(probe("text", moved, "nats"))
    return decide(before, after, Gate(alpha=ALPHA))


def rates(runs: int, rng: np.random.Generator) -> None:
    print(f"gate, {runs} simulated runs of 3 probes x 1000 items and 100 documents, alpha {ALPHA}")
    for said, fall, rise in (
        ("base against base", 0.0, 0.0),
        ("every guardrail at its margin", 0.02, 0.05),
        ("twice the margin", 0.04, 0.10),
    ):
        found = [simulated(rng, 1000, fall, rise) for _ in range(runs)]
        verdicts = [str(one.verdict) for one in found]
        print(f"  {said}: " + ", ".join(
            f"{word} {verdicts.count(word) / runs:.1%}"
            for word in ("PASS", "FAIL", "INCONCLUSIVE")
        ))  # fmt: skip
    rows = [str(simulated(rng, 1000, 0.02, 0.05).rows[0].verdict) for _ in range(runs)]
    print(f"  one probe at its margin: PASS {rows.count('PASS') / runs:.1%} (nominal {ALPHA:.0%})")


def detected(rng: np.random.Generator, items: int, fall: float, paired: bool, runs: int) -> float:
    """Share of runs in which a fall is shown at level alpha: the upper bound lies below zero."""
    from scipy.special import ndtri

    hits = 0
    for _ in range(runs):
        before = (rng.random(items) < ACCURACY).astype(float)
        if paired:
            after = changed(rng, before, CHURN, fall)
            hits += paired_difference(before, after, alpha=ALPHA, bounded=True).upper < 0
        else:  # other items after than before
            after = (rng.random(items) < ACCURACY - fall).astype(float)
            stderr = np.hypot(stderr_of_mean(before), stderr_of_mean(after))
            hits += after.mean() - before.mean() < float(ndtri(ALPHA)) * stderr
    return hits / runs


def smallest(rng: np.random.Generator, items: int, paired: bool, runs: int) -> float:
    """The fall that is found 9 times in 10, by bisection on simulated power."""
    low, high = 0.0, 0.3
    for _ in range(8):
        middle = (low + high) / 2
        enough = detected(rng, items, middle, paired, runs) >= 0.9
        low, high = (low, middle) if enough else (middle, high)
    return high


def power(runs: int, rng: np.random.Generator) -> None:
    print(f"smallest fall found 90 % of the time (base {ACCURACY:.0%} right, churn {CHURN:.0%})")
    for items in (200, 500, 1500):
        pair, other = (100 * smallest(rng, items, paired, runs) for paired in (True, False))
        print(f"  {items} items: paired {pair:.1f} points, unpaired {other:.1f} points")


def alarm_rates(runs: int, rng: np.random.Generator, probes: int = 50, checks: int = 100) -> None:
    margin, block = 0.02, 20
    names = [str(k) for k in range(probes)]
    none = np.zeros(block)

    def run(odds: tuple[float, float, float]) -> tuple[bool, int]:
        watched = dict.fromkeys(names, Evidence())
        falls = rng.choice([-1.0, 0.0, 1.0], size=(checks, probes, block), p=odds)
        for check in range(checks):
            for k, name in enumerate(names):
                # higher is better: a fall of d is 0 before and -d after
                watched[name] = update(watched[name], none, -falls[check, k], margin=margin)
            if alarms(watched, ALPHA):
                return True, check + 1
        return False, checks

    print(f"alarms, {probes} probes x {checks} checks of {block} fresh items, margin 2 points")
    for said, odds in (
        ("base against base", (0.02, 0.96, 0.02)),
        ("every probe at its margin", (0.02, 0.94, 0.04)),
    ):
        false = sum(run(odds)[0] for _ in range(runs))
        print(f"  {said}: any false alarm in {false / runs:.1%} of {runs} runs (alpha {ALPHA:.0%})")
    for fall in (0.05, 0.1, 0.2):
        waited = []
        for _ in range(20):
            one, check = Evidence(), 0
            while check < checks and one.peak < np.log(probes / ALPHA):
                draw = rng.choice([-1.0, 0.0, 1.0], size=block, p=(0.02, 0.96 - fall, 0.02 + fall))
                one, check = update(one, none, -draw, margin=margin), check + 1
            waited.append(check)
        print(f"  a fall of {fall:.0%} from the start: alarm after {np.median(waited):.0f} checks")


@app.command()
def simulate(runs: int = 1000, alarm_runs: int = 200, power_runs: int = 400, seed: int = 0) -> None:
    """Error rates where the truth is known."""
    for part in (
        lambda: rates(runs, np.random.default_rng(seed)),
        lambda: power(power_runs, np.random.default_rng(seed + 1)),
        lambda: alarm_rates(alarm_runs, np.random.default_rng(seed + 2)),
    ):
        started = time.perf_counter()
        part()
        print(f"  ({time.perf_counter() - started:.0f} s)", flush=True)


def planted(model: Any, blocks: list[int], size: float, seed: int) -> Callable[[], None]:
    """Add noise of `size` times each matrix's own spread in some blocks; returns the undoing."""
    import torch

    random = torch.Generator().manual_seed(seed)
    kept = []
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.ndim == 2 and any(f".layers.{b}." in name for b in blocks):
                kept.append((tensor, tensor.clone()))
                noise = torch.randn(tensor.shape, generator=random, dtype=torch.float32)
                tensor.add_((size * tensor.float().std() * noise).to(tensor.dtype))

    def undo() -> None:
        with torch.no_grad():
            for tensor, then in kept:
                tensor.copy_(then)

    return undo


def conditions(base: Any, batches: Callable[[int], None], quick: bool) -> Iterator[tuple[str, Any]]:
    """(what was done, the model) of each; the base is as it was after each."""
    import torch

    for tokens in (512,) if quick else (256, 512, 2048, 16384):
        batches(tokens)
        yield f"base, {tokens} tokens a batch", base
    batches(8192)
    base.to(torch.bfloat16)
    yield "base, bfloat16", base


@app.command()
def real(threads: int = 2, items: int = 100, seeds: int = 2, quick: bool = False) -> None:
    """The lab's base against itself, and against itself with planted damage."""
    import torch

    from holdfast.checkpoint import load_checkpoint
    from holdfast.data.rows import Source
    from holdfast.lab import base_path, write_files
    from holdfast.measure import text_documents
    from holdfast.meters import likelihood, scoring
    from holdfast.meters.canary import Canary
    from holdfast.pair import Texts

    torch.set_num_threads(threads)
    started = time.perf_counter()
    with TemporaryDirectory() as scratch:
        files = write_files(Path(scratch))
        texts = Texts(Canary(sources=[Source(path=str(files["canary"]))]), [str(files["probes"])])
        chosen: dict[str, int] = {}
        kept = []
        for item in texts.items():
            chosen[item.probe] = chosen.get(item.probe, 0) + 1
            if "guardrail" in item.tags and chosen[item.probe] <= items:
                kept.append(item)
        first = load_checkpoint("BASE", str(base_path()), None, "float32")
        documents = text_documents(texts.canary, first.tokenizer, first.context)
    measure = texts.measure(first.tokenizer, documents, kept)
    gate = Gate(alpha=ALPHA)
    before = measure.whole(first.model, 0)
    print(f"lab base: {len(kept)} items of {len(chosen)} probes, {len(documents)} documents")

    def batches(tokens: int) -> None:
        for module in (scoring, likelihood):
            if hasattr(module, "BATCH_TOKENS"):
                module.BATCH_TOKENS = tokens

    def judge(said: str, model: Any) -> tuple[bool, float]:
        result = decide(before, measure.whole(model, 1), gate)
        fallen = [row.name for row in result.rows if row.decisive and row.verdict == "FAIL"]
        canary = [row for row in result.rows if row.meter == "canary"]
        rise = np.mean([row.difference / row.before for row in canary])
        print(f"  {said}: {result.verdict}, failed {len(fallen)} of {len(result.rows)} "
              f"({', '.join(fallen[:4])}), canary {rise:+.2%}", flush=True)  # fmt: skip
        return str(result.verdict) == "FAIL", float(rise)

    weights = {name: tensor.clone() for name, tensor in first.model.named_parameters()}
    for said, model in conditions(first.model, batches, quick):
        judge(said, model)
    first.model.to(torch.float32)
    with torch.no_grad():
        for name, tensor in first.model.named_parameters():
            tensor.copy_(weights[name])
    layers = first.model.config.num_hidden_layers
    curve: dict[float, list[tuple[bool, float]]] = {}
    for block in (0, layers - 1) if not quick else (0,):
        for size in (0.1, 0.2, 0.4, 0.8) if not quick else (0.2, 0.6):
            for seed in range(1 if quick else seeds):
                undo = planted(first.model, [block], size, seed)
                said = f"noise {size} in block {block}, seed {seed}"
                curve.setdefault(size, []).append(judge(said, first.model))
                undo()
    for size, found in curve.items():
        share, rise = np.mean([f for f, _ in found]), np.mean([r for _, r in found])
        print(f"  noise {size}: found in {share:.0%} of {len(found)}, canary {rise:+.2%}")
    print(f"  ({time.perf_counter() - started:.0f} s)")


if __name__ == "__main__":
    app()
