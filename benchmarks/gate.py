"""The gate's own error rates: how often it is wrong, and the smallest fall that it finds.

Simulated, so that the truth is known; gate_real.py has the same of real readings.

    python benchmarks/gate.py                    # --part rates, power or alarms: one of them

Each figure stands beside what is promised, with a Wilson interval of 95 %: met (at or below it),
met within error (the interval holds it) or MISSED.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
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


def against(hits: float, runs: int, nominal: float) -> str:
    """`3.1% [2.2, 4.4] of 1000, nominal 5%: met`."""
    share, z = hits / runs, 1.96
    middle = (share + z * z / (2 * runs)) / (1 + z * z / runs)
    reach = z * np.sqrt(share * (1 - share) / runs + (z / (2 * runs)) ** 2) / (1 + z * z / runs)
    said = (
        "met" if share <= nominal else "met within error" if middle - reach <= nominal else "MISSED"
    )
    return (
        f"{share:.2%} [{100 * (middle - reach):.2f}, {100 * (middle + reach):.2f}] of {runs:,}, "
        f"nominal {nominal:.0%}: {said}"
    )


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
    print(
        f"gate, {runs:,} simulated runs of 3 probes x 1000 items and 100 documents, alpha {ALPHA}"
    )
    for said, wrong, fall, rise in (
        ("base against base, FAIL", "FAIL", 0.0, 0.0),
        ("every guardrail at its margin, PASS", "PASS", 0.02, 0.05),
        ("twice the margin, PASS", "PASS", 0.04, 0.10),
    ):
        found = [str(simulated(rng, 1000, fall, rise).verdict) for _ in range(runs)]
        print(f"  {said}: {against(found.count(wrong), runs, ALPHA)}")
    for said, margin, once in at_margin(rng):
        passed = sum(once().lower > -margin for _ in range(runs))
        print(
            f"  one capability exactly at its margin, {said}, PASS: {against(passed, runs, ALPHA)}"
        )


def at_margin(rng: np.random.Generator) -> Iterator[tuple[str, float, Callable[[], Any]]]:
    """(what, its margin, a reading of a model that lost just that)."""

    def scores(n: int, churn: float) -> Any:
        before = (rng.random(n) < ACCURACY).astype(float)
        after = changed(rng, before, churn, 0.02)
        return paired_difference(before, after, alpha=ALPHA, bounded=True)

    def losses(n: int) -> Any:
        fall = rng.gamma(2, 0.05, n)  # skewed, of mean 0.1
        return paired_difference(np.zeros(n), -fall, alpha=ALPHA)

    def grouped(groups: int, size: int) -> Any:
        """A fall of 5 points: 5 % of the groups turn wrong as a whole."""
        before = np.ones(groups * size)
        after = before * np.repeat(rng.random(groups) >= 0.05, size)
        names = [str(i // size) for i in range(groups * size)]
        return paired_difference(before, after, clusters=names, alpha=ALPHA, bounded=True)

    def unlike(sizes: np.ndarray) -> Any:
        """A fall of 10 points: 20 % of the clusters turn wrong as a whole, 10 % right."""
        u = np.repeat(rng.random(len(sizes)), sizes)
        before = ((u < 0.2) | (u > 0.6)).astype(float)
        after = (((u > 0.2) & (u < 0.3)) | (u > 0.6)).astype(float)
        names = [str(g) for g in np.repeat(np.arange(len(sizes)), sizes)]
        return paired_difference(before, after, clusters=names, alpha=ALPHA, bounded=True)

    drawn = np.random.default_rng(0).lognormal(1, 1, 60)
    sizes = np.maximum(1, drawn.round()).astype(int)
    ends = f"{sizes.min()} to {sizes.max()} scores"
    yield "250 scores, churn 4 %", 0.02, lambda: scores(250, 0.04)
    yield "1,500 scores, churn 4 %", 0.02, lambda: scores(1500, 0.04)
    yield "1,500 scores, no other change", 0.02, lambda: scores(1500, 0.0)
    yield "20 documents, skewed losses", 0.1, lambda: losses(20)
    yield "100 documents, skewed losses", 0.1, lambda: losses(100)
    yield "60 clusters of 5 scores", 0.05, lambda: grouped(60, 5)
    yield f"60 clusters of {ends}", 0.1, lambda: unlike(sizes)
    yield "99 scores and a cluster of 25", 0.1, lambda: unlike(np.array([1] * 99 + [25]))
    yield "99 scores and a cluster of 100", 0.1, lambda: unlike(np.array([1] * 99 + [100]))


def shown(before: np.ndarray, after: np.ndarray, paired: bool) -> bool:
    """Whether a fall is shown at level alpha: the upper bound lies below zero."""
    from scipy.special import ndtri

    if paired:
        return paired_difference(before, after, alpha=ALPHA, bounded=True).upper < 0
    stderr = np.hypot(stderr_of_mean(before), stderr_of_mean(after))
    return bool(after.mean() - before.mean() < float(ndtri(ALPHA)) * stderr)


def detected(rng: np.random.Generator, items: int, fall: float, paired: bool, runs: int) -> float:
    """Share of runs in which a fall is shown; unpaired: other items after than before."""
    hits = 0
    for _ in range(runs):
        before = (rng.random(items) < ACCURACY).astype(float)
        after = changed(rng, before, CHURN, fall) if paired else (
            rng.random(items) < ACCURACY - fall).astype(float)  # fmt: skip
        hits += shown(before, after, paired)
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
        print(f"  {said}, any false alarm: {against(false, runs, ALPHA)}", flush=True)
    for fall in (0.05, 0.1, 0.2):
        waited = []
        for _ in range(20):
            one, check = Evidence(), 0
            while check < checks and one.peak < np.log(probes / ALPHA):
                draw = rng.choice([-1.0, 0.0, 1.0], size=block, p=(0.02, 0.96 - fall, 0.02 + fall))
                one, check = update(one, none, -draw, margin=margin), check + 1
            waited.append(check)
        print(f"  a fall of {fall:.0%} from the start: alarm after {np.median(waited):.0f} checks")


PARTS = {"rates": rates, "power": power, "alarms": alarm_rates}


@app.command()
def simulate(part: str = "", runs: int = 1000, seed: int = 0) -> None:
    """Error rates where the truth is known."""
    for place, (name, do) in enumerate(PARTS.items()):
        if part in ("", name):
            started = time.perf_counter()
            do(runs, np.random.default_rng(seed + place))
            print(
                f"  ({name}: seed {seed + place}, {time.perf_counter() - started:.0f} s)",
                flush=True,
            )


if __name__ == "__main__":
    app()
