"""What a cell came to, and how sure that is.

    gain        accuracy on the lesson's probe
    rise        rise of the canary's loss over the base's, by domain; worst and mean domain
    fall        fall of accuracy of the base's own probes; worst and mean
    flips       share of the old probes' items that went from right to wrong, and back; a base read
                twice flips none, since decoding is greedy
    kept        of a sequence: the first lesson's accuracy after the second, over what it was
    forgotten   the worst of rise, fall and what is not kept: what an arm is judged by

Intervals: two-level bootstrap, seeds and then the items or documents within each (percentiles).
Two arms are compared on the same resampled seeds and items. Holm's step-down over the arms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from arms import VALIDATION
from numpy.typing import NDArray

Array = NDArray[np.float64]
Cell = dict[str, Any]

DRAWS = 2000
FULL = "full"
EQUAL = 0.9
"""Share of the best gain of full fine-tuning at which arms are compared; a lesson's probe of 56 to
200 items has a standard error of 2 to 4 points there."""
REFERENCE = (0.0, 0.25)
"""The corner of the hypervolume, fixed beforehand: nothing learned, a quarter more loss on the
worst domain."""


def pairs(cell: Cell, meter: str) -> dict[str, Array]:
    """Before and after of each item (n, 2), by domain or old probe."""
    old = ("guardrail", "rare") if meter == "probe" else ("",)
    return {
        name: np.array([rows["before"], rows["after"]], dtype=float).T
        for name, rows in cell[meter].items()
        if rows["kind"] in old
    }


def target_items(cell: Cell) -> Array:
    """After it all, right or wrong, of each item of what was taught; in a sequence of both."""
    taught = [rows["after"] for rows in cell["probe"].values() if rows["kind"] == "target"]
    return np.concatenate([np.array(after, dtype=float) for after in taught])


def kept(cell: Cell) -> float | None:
    """Of a sequence: what the first lesson's accuracy is after the second, over what it was.

    1 where it was not learned and there is nothing to keep; None where there is one lesson.
    """
    first, _, second = cell["lesson"].partition("+")
    if not second:
        return None
    was = cell["after_first_stage"]
    return cell["target"][first] / was if was else 1.0


def gain(items: Array) -> float:
    """Accuracy on the lesson."""
    return float(items.mean())


def rises(domains: Sequence[Array]) -> Array:
    """Relative rise of the mean loss of each domain."""
    return np.array([two[:, 1].mean() / two[:, 0].mean() - 1 for two in domains])


def falls(probes: Sequence[Array]) -> Array:
    """Fall of each old probe's accuracy."""
    return np.array([two[:, 0].mean() - two[:, 1].mean() for two in probes])


def flips(probes: Sequence[Array]) -> tuple[float, float]:
    """Share of items lost, and won."""
    every = np.concatenate(list(probes))
    return float((every[:, 1] < every[:, 0]).mean()), float((every[:, 1] > every[:, 0]).mean())


def point(cell: Cell) -> dict[str, float]:
    """The figures of one cell."""
    domains, probes = pairs(cell, "canary"), pairs(cell, "probe")
    rise, fall = rises(list(domains.values())), falls(list(probes.values()))
    lost, won = flips(list(probes.values()))
    stage = kept(cell)
    left_out = [r for name, r in zip(domains, rise, strict=True) if name in cell["left_out"]]
    replayed = [r for name, r in zip(domains, rise, strict=True) if name not in cell["left_out"]]
    return {
        "gain": gain(target_items(cell)),
        "worst rise": float(rise.max()),
        "mean rise": float(rise.mean()),
        "worst fall": float(fall.max()),
        "mean fall": float(fall.mean()),
        "lost": lost,
        "won": won,
        "left out rise": float(np.mean(left_out)),
        "replayed rise": float(np.mean(replayed)),
        **({} if stage is None else {"kept": stage}),
    }


def forgotten(figures: dict[str, float]) -> float:
    """The worst of what was lost."""
    return max(figures["worst rise"], figures["worst fall"], 1 - figures.get("kept", 1.0))


def utility(figures: dict[str, float]) -> float:
    """Learned less forgotten, of which more than all counts as all."""
    return figures["gain"] - min(1.0, forgotten(figures))


def tuning(cells: Sequence[Cell], arm: str) -> list[Cell]:
    """The cells of an arm that its rate is chosen by, from the lowest rate to the highest."""
    mine = (c for c in cells if c["arm"] == arm and c["seed"] == VALIDATION and "failed" not in c)
    return sorted(mine, key=lambda c: float(c["rate"]))


def enough(cells: Sequence[Cell]) -> float:
    """What counts as learned: `EQUAL` of the best that full fine-tuning came to at any rate."""
    return EQUAL * max(gain(target_items(cell)) for cell in tuning(cells, FULL))


def chosen(cells: Sequence[Cell], arm: str) -> Cell | None:
    """Of the tuning cells, the one that forgets least of those that learn enough.

    Equal learning, then: without a floor an arm is best off where it learns nothing. Where none
    learns enough it is the one that learns most.
    """
    tried, floor = tuning(cells, arm), enough(cells)
    learned = [cell for cell in tried if point(cell)["gain"] >= floor]
    if learned:
        return min(learned, key=lambda cell: forgotten(point(cell)))
    return max(tried, key=lambda cell: point(cell)["gain"], default=None)


def learned_enough(cells: Sequence[Cell], arm: str) -> bool:
    """Whether an arm's forgetting is to be compared."""
    best = chosen(cells, arm)
    return best is not None and point(best)["gain"] >= enough(cells)


def tested(cells: Sequence[Cell], arm: str) -> list[Cell]:
    """The cells of an arm at its chosen rate, on the seeds that nothing was chosen on."""
    best = chosen(cells, arm)
    mine = (
        c
        for c in cells
        if c["arm"] == arm and c["seed"] != VALIDATION and best and c["rate"] == best["rate"]
    )
    return sorted((c for c in mine if "failed" not in c), key=lambda c: int(c["seed"]))


def resampled(cells: Sequence[Cell], rng: np.random.Generator) -> dict[str, float]:
    """The mean figures of one bootstrap draw: seeds, then what lies within each."""
    chosen = [cells[i] for i in rng.integers(len(cells), size=len(cells))]
    found: list[dict[str, float]] = []
    for cell in chosen:
        items = _drawn(target_items(cell), rng)
        domains = [_drawn(two, rng) for two in pairs(cell, "canary").values()]
        probes = [_drawn(two, rng) for two in pairs(cell, "probe").values()]
        rise, fall = rises(domains), falls(probes)
        found.append(
            {
                "gain": gain(items),
                "worst rise": float(rise.max()),
                "mean rise": float(rise.mean()),
                "worst fall": float(fall.max()),
                "mean fall": float(fall.mean()),
                **({} if (stage := kept(cell)) is None else {"kept": stage}),
            }
        )
    return {key: float(np.mean([one[key] for one in found])) for key in found[0]}


def _drawn(values: Array, rng: np.random.Generator) -> Array:
    return values[rng.integers(len(values), size=len(values))]


def interval(cells: Sequence[Cell], *, seed: int = 0, draws: int = DRAWS) -> dict[str, Any]:
    """95 % percentile interval of each figure."""
    rng = np.random.default_rng(seed)
    many = [resampled(cells, rng) for _ in range(draws)]
    return {key: tuple(np.percentile([one[key] for one in many], (2.5, 97.5))) for key in many[0]}


def differs(
    ours: Sequence[Cell],
    theirs: Sequence[Cell],
    figure: Callable[[dict[str, float]], float],
    *,
    seed: int = 0,
    draws: int = DRAWS,
) -> tuple[float, float]:
    """Mean difference ours - theirs over paired draws, and its two-sided bootstrap p-value.

    Both are drawn with the same random numbers, so that the same seeds and items meet.
    """
    first, second = (np.random.default_rng(seed) for _ in range(2))
    many = np.array(
        [figure(resampled(ours, first)) - figure(resampled(theirs, second)) for _ in range(draws)]
    )
    tail = min((many <= 0).mean(), (many >= 0).mean())
    return float(many.mean()), float(min(1.0, 2 * max(tail, 1 / draws)))


def holm(p_values: dict[str, float]) -> dict[str, float]:
    """Adjusted p-values (Holm 1979)."""
    found, largest = {}, 0.0
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, p * (len(p_values) - rank)))
        found[name] = largest
    return found


def hypervolume(points: Sequence[tuple[float, float]]) -> float:
    """Area between the frontier of (gain, worst rise) and `REFERENCE`, as a share of the whole."""
    floor, ceiling = REFERENCE
    inside = sorted({(g, max(r, 0.0)) for g, r in points if g > floor and r < ceiling})
    area, right = 0.0, floor
    best = ceiling
    # from the largest gain down: each step adds the strip up to it at the least rise beyond it
    strips: list[tuple[float, float]] = []
    for g, r in reversed(inside):
        if r < best:
            best = r
            strips.append((g, r))
    for g, r in reversed(strips):
        area += (g - right) * (ceiling - r)
        right = g
    return area / ((1 - floor) * ceiling)
