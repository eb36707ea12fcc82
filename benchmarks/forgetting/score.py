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

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from arms import VALIDATION
from numpy.typing import NDArray

Array = NDArray[np.float64]
Cell = dict[str, Any]
Figures = Mapping[str, Any]
"""Of a cell, or of every draw of some cells."""

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


def mean_point(cells: Sequence[Cell]) -> dict[str, float]:
    """What several cells came to, on average."""
    many = [point(cell) for cell in cells]
    return {key: sum(one[key] for one in many) / len(many) for key in many[0]}


def forgotten(figures: Figures) -> Any:
    """The worst of what was lost."""
    lost = np.maximum(figures["worst rise"], figures["worst fall"])
    return np.maximum(lost, 1 - figures["kept"]) if "kept" in figures else lost


def utility(figures: Figures) -> Any:
    """Learned less forgotten, of which more than all counts as all."""
    return figures["gain"] - np.minimum(1.0, forgotten(figures))


def tuning(cells: Sequence[Cell], arm: str) -> list[Cell]:
    """The cells of an arm that its rate is chosen by, from the lowest rate to the highest."""
    mine = (c for c in cells if c["arm"] == arm and c["seed"] == VALIDATION and "failed" not in c)
    return sorted(mine, key=lambda c: float(c["rate"]))


def enough(cells: Sequence[Cell], share: float = EQUAL) -> float:
    """What counts as learned: a share of the best that full fine-tuning came to at any rate."""
    return share * max(gain(target_items(cell)) for cell in tuning(cells, FULL))


def least_forgotten(cells: Sequence[Cell], arm: str, share: float = EQUAL) -> Cell | None:
    """Of an arm's tuning cells that learned enough, the one that forgot least; None: none did."""
    floor = enough(cells, share)
    learned = [cell for cell in tuning(cells, arm) if gain(target_items(cell)) >= floor]
    return min(learned, key=lambda cell: forgotten(point(cell)), default=None)


def chosen(cells: Sequence[Cell], arm: str) -> Cell | None:
    """The tuning cell whose rate the test seeds are run at.

    At equal learning, the one that forgets least: without a floor an arm is best off where it
    learns nothing. Where none learns enough it is the one that learns most.
    """
    return least_forgotten(cells, arm) or most_learned(cells, arm)


def most_learned(cells: Sequence[Cell], arm: str) -> Cell | None:
    """The tuning cell that learned most; the lowest rate of those that learned as much."""
    return max(tuning(cells, arm), key=lambda cell: gain(target_items(cell)), default=None)


def learned_enough(cells: Sequence[Cell], arm: str) -> bool:
    """Whether an arm's forgetting is to be compared."""
    return least_forgotten(cells, arm) is not None


def tested(cells: Sequence[Cell], arm: str) -> list[Cell]:
    """The cells of an arm at its chosen rate, on the seeds that nothing was chosen on."""
    if not tuning(cells, FULL):
        return []
    best = chosen(cells, arm)
    mine = (
        c
        for c in cells
        if c["arm"] == arm and c["seed"] != VALIDATION and best and c["rate"] == best["rate"]
    )
    return sorted((c for c in mine if "failed" not in c), key=lambda c: int(c["seed"]))


def resampled(cells: Sequence[Cell], *, seed: int = 0, draws: int = DRAWS) -> dict[str, Array]:
    """Mean figures of each bootstrap draw (draws,): seeds, then what lies within each.

    Arms are drawn with the same numbers, so that the same seeds and items meet.
    """
    chosen = np.random.default_rng(seed).integers(len(cells), size=(draws, len(cells)))
    total: dict[str, Array] = {}
    for slot in range(len(cells)):
        figures = [_within(cell, slot, seed, draws) for cell in cells]
        for key in figures[0]:
            picked = np.stack([one[key] for one in figures])[chosen[:, slot], np.arange(draws)]
            total[key] = total.get(key, 0.0) + picked / len(cells)
    return total


def _within(cell: Cell, slot: int, seed: int, draws: int) -> dict[str, Array]:
    """A cell's figures (draws,), its items and documents drawn anew."""
    groups = [target_items(cell)[:, None], *pairs(cell, "canary").values()]
    domains = len(groups) - 1
    groups += pairs(cell, "probe").values()
    means = [
        _weights(len(values), (seed, slot, number), draws) @ values
        for number, values in enumerate(groups)
    ]
    rise = np.stack([two[:, 1] / two[:, 0] - 1 for two in means[1 : domains + 1]])
    fall = np.stack([two[:, 0] - two[:, 1] for two in means[domains + 1 :]])
    stage = kept(cell)
    return {
        "gain": means[0][:, 0],
        "worst rise": rise.max(0),
        "mean rise": rise.mean(0),
        "worst fall": fall.max(0),
        "mean fall": fall.mean(0),
        **({} if stage is None else {"kept": np.full(draws, stage)}),
    }


@lru_cache(maxsize=256)
def _weights(items: int, seed: tuple[int, ...], draws: int) -> Array:
    """How often each item is in each draw, over the items (draws, items)."""
    random = np.random.default_rng(seed)
    return random.multinomial(items, np.full(items, 1 / items), size=draws) / items


def interval(cells: Sequence[Cell], *, seed: int = 0, draws: int = DRAWS) -> dict[str, Any]:
    """95 % percentile interval of each figure."""
    many = resampled(cells, seed=seed, draws=draws)
    return {key: tuple(np.percentile(values, (2.5, 97.5))) for key, values in many.items()}


def differs(
    ours: Sequence[Cell],
    theirs: Sequence[Cell],
    figure: Callable[[Figures], Any],
    *,
    seed: int = 0,
    draws: int = DRAWS,
) -> tuple[float, float]:
    """Mean difference ours - theirs over paired draws, and its two-sided bootstrap p-value."""
    first, second = (resampled(cells, seed=seed, draws=draws) for cells in (ours, theirs))
    many = figure(first) - figure(second)
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


def cost_over_full(costs: Sequence[Cell], arm: str, what: str) -> float:
    """What an arm takes over what full fine-tuning does, medians; nan where it was not measured."""
    ours, full = (
        np.median([line.get(what, np.nan) for line in costs if line["arm"] == one] or [np.nan])
        for one in (arm, FULL)
    )
    return float(ours / full)


def by_size(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Of each size of the base and arm: means over the seeds, and what the base knew."""
    found = []
    for size, arm in dict.fromkeys((cell["size"], cell["arm"]) for cell in cells):
        some = [c for c in cells if (c["size"], c["arm"]) == (size, arm) and "failed" not in c]
        if some:
            old = [rows for rows in some[0]["probe"].values() if rows["kind"] == "guardrail"]
            knew = float(np.mean([np.mean(rows["before"]) for rows in old]))
            found.append({"size": size, "arm": arm, "knew": knew} | mean_point(some))
    return found
