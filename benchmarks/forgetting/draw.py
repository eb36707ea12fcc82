"""The page: a table a lesson, and the frontier of what is learned against what is forgotten."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from arms import ARMS, EARLIER, HOTTER, RATES
from score import (
    EQUAL,
    FULL,
    REFERENCE,
    by_size,
    cost_over_full,
    differs,
    forgotten,
    holm,
    hypervolume,
    interval,
    learned_enough,
    least_forgotten,
    mean_point,
    point,
    resampled,
    tested,
    tuning,
    utility,
)

Cell = dict[str, Any]
ALL = 0.99
"""What counts as all of the gain."""
OURS = "holdfast default"
SAME_ORDER = "full, herded"
TITLES = {
    "verbs": "Irregular verbs: a skill",
    "facts": "New facts: emblems",
    "extraction": "A new output format with a skewed label",
    "verbs+extraction": "Two stages: the verbs, then the format",
}
INTRODUCTION = f"""\
One protocol for every method: `benchmarks/forgetting/__main__.py` says how. gain: accuracy on the
lesson's probe. rise: of the loss on held-out text of the base's kind, worst and mean of seven
domains. fall: of accuracy, worst of the base's seven probes; "again": that after ten old examples
were practised. forgotten: the worst of rise, fall and what a second stage took from the first; it
is what an arm is judged by. "at {ALL:.0%}": forgotten on the tuning seed, at the rate that forgot
least of those which learned {ALL:.0%} of full fine-tuning's best there; one run each. lost / won:
old items that went from right to wrong, and back. left out: mean rise of the two domains that no
replay has, beside that of the others. KL: of the base to the tuned model in nats a token, on the
lesson and, worst domain, on old text. Brackets: 95 % two-level bootstrap (seeds, then items).
hypervolume: of the frontier of the rates on the validation seed, reference gain
{REFERENCE[0]:g}, rise {REFERENCE[1]:.0%}. time / memory: CPU seconds and peak memory of one
training on new facts in a process of its own, over those of plain full fine-tuning. p: gain less
forgotten, against {OURS}, Holm over the arms. An arm marked * learned less than {EQUAL:.0%} of what
full fine-tuning can, at every rate: what it forgot is not to be compared. Every arm has
{len(RATES)} rates on the validation seed, and up to {len(HOTTER)} hotter ones ({HOTTER[0]:g}x,
{HOTTER[1]:g}x) while its hottest learns most and not enough.

What is not alike: the rate falls along a line in holdfast's arms and wherever an arm says linear or
herded, in every other along the classic recipe's cosine. Rows come in one random order, save in
holdfast's present default and in the arms that say herded: there each step has some of every kind
(`train.order`). "holdfast, random order" is the default as it was before, "holdfast, cosine" the
one before that. Weight and share of holdfast's anchor were chosen on these lessons and this
validation seed (`scan`); L2-SP, EWC, KL on the lesson and the caps have one strength each, from
`benchmarks/levers.py`. Cells ran on a CPU in float32 or on an H200 under bfloat16 autocast (H in
the column "on"). In the sequence a second stage of holdfast's knows the first by its run's folder,
and gives {EARLIER:.0%} of its tokens to that lesson's rows; joint training and "replay 25 %, lesson
15 %" are given as many of them, the others none. trl's arms train in its own trainers, as its
documentation says, in float32 like all others on a CPU (SDFT: one of its eight samples a row). A
budget's time is mostly that of reading canaries while it trains and at its end.
"""

SIZES = """\
Made by `... sizes`: the verbs, three test seeds, every arm at four times the automatic rate, which
knows the width of a model; the bases were pretrained on the same tokens. knew: the mean accuracy of
the base on its seven probes.
"""


def write_page(
    cells: Sequence[Cell], costs: Sequence[Cell], sizes: Sequence[Cell], out: Path
) -> None:
    """Write `out`, and a picture for each lesson beside it."""
    done = [cell for cell in cells if "failed" not in cell]
    steps = {cell["steps"] for cell in done}
    measured = sorted({line["steps"] for line in costs})
    devices = []
    for name, count in Counter(c["device"] for c in done).items():
        hours = sum(c["seconds"] for c in done if c["device"] == name) / 3600
        devices.append(f"{count} on {name}, {hours:.1f} hours of training, side by side")
    parts = [
        "# Benchmark: learned against forgotten",
        "",
        f"Made by `python benchmarks/forgetting run`, `... cost` and `... table`; {len(done)} "
        f"cells of {' or '.join(map(str, sorted(steps)))} steps ({'; '.join(devices)}). What is "
        f"not here yet, `run` fills in. Costs are of {' or '.join(map(str, measured))} steps.",
        "",
        INTRODUCTION,
    ]
    for lesson, title in TITLES.items():
        some = [cell for cell in done if cell["lesson"] == lesson]
        if tested(some, OURS) and tested(some, FULL):
            name = f"benchmark-{lesson.replace('+', '-')}.svg"
            parts += [f"## {title}", "", *_table(some, costs), "", *_aims(some, costs)]
            parts += [f"![{title}]({name})", ""]
            _picture(some, title, out.with_name(name))
    if sizes:
        parts += ["## The size of the base", "", SIZES, "", *_sizes(sizes), ""]
    failed = [cell for cell in cells if "failed" in cell]
    if failed:
        parts += ["## Cells that failed", ""]
        parts += [f"- {c['lesson']}, {c['arm']}, x{c['rate']:g}: {c['failed']}" for c in failed]
    out.write_text("\n".join(parts) + "\n", encoding="utf-8")


def _sizes(cells: Sequence[Cell]) -> list[str]:
    shown = ("knew", "gain", "worst rise", "mean rise", "worst fall")
    rows = [
        {"base": one["size"], "arm": one["arm"]} | {key: f"{one[key]:.1%}" for key in shown}
        for one in by_size(cells)
    ]
    return _lines(rows, list(rows[0]))


def _costs(costs: Sequence[Cell], arm: str) -> str:
    seconds, memory = (cost_over_full(costs, arm, what) for what in ("seconds", "peak_mib"))
    return "-" if np.isnan(seconds) else f"{seconds:.2f} / {memory:.2f}"


def _volume(cells: Sequence[Cell], arm: str) -> float:
    points = [point(cell) for cell in tuning(cells, arm)]
    return hypervolume([(one["gain"], one["worst rise"]) for one in points])


def _table(cells: Sequence[Cell], costs: Sequence[Cell]) -> list[str]:
    """One line an arm with test seeds: those that learned enough first, by what they forgot."""
    ours = tested(cells, OURS)
    p = {
        arm: differs(ours, theirs, utility)[1]
        for arm in ARMS
        if arm != OURS and ours and len(theirs := tested(cells, arm)) == len(ours)
    }
    adjusted = holm(p)
    lines = []
    for arm in ARMS:
        mine = tested(cells, arm)
        if not mine:
            continue
        mean, within = mean_point(mine), interval(mine)
        learned, all_of_it = learned_enough(cells, arm), least_forgotten(cells, arm, ALL)
        line = {"arm": f"{arm}{'' if learned else ' *'}", "rate": f"{mine[0]['rate']:g}x"}
        for key in ("gain", "worst rise", "mean rise", "worst fall"):
            line[key] = f"{mean[key]:.1%} [{within[key][0]:.1%}, {within[key][1]:.1%}]"
        line["again"] = f"{np.mean([_again(cell) for cell in mine]):.1%}"
        line["forgotten"] = f"{forgotten(mean):.1%}"
        line[f"at {ALL:.0%}"] = f"{forgotten(point(all_of_it)):.1%}" if all_of_it else "-"
        line["lost / won"] = f"{mean['lost']:.1%} / {mean['won']:.1%}"
        line["left out / replayed"] = f"{mean['left out rise']:.1%} / {mean['replayed rise']:.1%}"
        if "kept" in mean:
            line["first stage kept"] = f"{mean['kept']:.0%}"
        new, old = ([c["kl_new"] for c in mine], [max(c["kl"].values()) for c in mine])
        line["KL lesson / old"] = f"{np.mean(new):.2f} / {np.mean(old):.3f}"
        line["hypervolume"] = f"{_volume(cells, arm):.3f}"
        line["time / memory"] = _costs(costs, arm)
        line["on"] = "/".join(sorted({"H" if "H200" in c["device"] else "CPU" for c in mine}))
        line["p"] = f"{adjusted[arm]:.3f}" if arm in adjusted else ""
        lines.append((not learned, forgotten(mean), line))
    ordered = [line for *_, line in sorted(lines, key=lambda one: one[:2])]
    main = ["arm", "rate", "gain", "worst rise", "worst fall", "forgotten", "first stage kept"]
    main += ["hypervolume", "time / memory", "p"]
    rest = [key for key in ordered[0] if key not in main]
    more = ["<details><summary>More of each arm</summary>", "", *_lines(ordered, ["arm", *rest])]
    return [*_lines(ordered, main), "", *more, "", "</details>"]


def _lines(rows: Sequence[dict[str, str]], headings: Sequence[str]) -> list[str]:
    """Those of the columns that there are."""
    some = [heading for heading in headings if heading in rows[0]]
    table = [some, ["---"] * len(some), *([row[heading] for heading in some] for row in rows)]
    return [f"| {' | '.join(row)} |" for row in table]


def _again(cell: Cell) -> float:
    """Worst fall of the old probes once ten old examples were practised."""
    was = {name: float(np.mean(rows["before"])) for name, rows in cell["probe"].items()}
    return max(was[name] - value for name, value in cell["recovered"].items())


def _aims(cells: Sequence[Cell], costs: Sequence[Cell]) -> list[str]:
    """The default beside full fine-tuning at the rate that learns: aims, and what was reached."""
    ours, full = (tested(cells, arm) for arm in (OURS, FULL))
    if not ours or not full:
        return []
    first, second = resampled(ours), resampled(full)
    learned = _ratio(first["gain"] / second["gain"])
    rise, fall = (_ratio(first[key] / second[key]) for key in ("worst rise", "worst fall"))
    volumes = {arm: _volume(cells, arm) for arm in ARMS if tested(cells, arm)}
    above = [arm for arm, volume in volumes.items() if volume > volumes[OURS]]
    mean = mean_point(ours)
    lines = [f"- gain over full fine-tuning's: {learned} (aim: at least 0.99)"]
    best = [
        f"{arm} {max(point(cell)['gain'] for cell in tried):.1%}"
        for arm in (FULL, SAME_ORDER, OURS)
        if (tried := tuning(cells, arm))
    ]
    lines += [f"- gain at the rate that learned most of the tuning seed's: {', '.join(best)}"]
    lines += [
        f"- worst rise over full fine-tuning's: {rise} (aim: at most 0.02); worst fall: {fall}",
        f"- time over full fine-tuning's: {_time(cells, costs)} (aim: at most 1.5)",
        f"- hypervolume above that of every arm: {'no, ' + ', '.join(above) if above else 'yes'}",
        "- rise of the left-out domains over that of the others: "
        f"{mean['left out rise'] / mean['replayed rise']:.2f} (aim: at most 1.5)",
    ]
    if "kept" in mean:
        lines.append(f"- first stage kept: {_ratio(first['kept'])} (aim: at least 0.97)")
    return [*lines, ""]


def _time(cells: Sequence[Cell], costs: Sequence[Cell]) -> str:
    """The default's; of a sequence, whose second stage reads more, by the cells themselves."""
    if "+" not in cells[0]["lesson"]:
        return f"{cost_over_full(costs, OURS, 'seconds'):.2f}"
    ours, full = ([c["seconds"] for c in tested(cells, arm)] for arm in (OURS, FULL))
    return f"{np.mean(ours) / np.mean(full):.2f}, wall time beside another job"


def _ratio(drawn: Sequence[float]) -> str:
    low, middle, high = np.percentile(drawn, (2.5, 50, 97.5))
    return f"{middle:.3f} [{low:.3f}, {high:.3f}]"


def _picture(cells: Sequence[Cell], title: str, out: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "holdfast"
    figure, axes = plt.subplots(figsize=(8, 5))
    for number, arm in enumerate(ARMS):
        tried = [point(cell) for cell in tuning(cells, arm)]
        if not tried:
            continue
        ours = arm == OURS
        axes.plot(
            [one["gain"] for one in tried],
            [max(one["worst rise"], 1e-3) for one in tried],
            marker="o",
            markersize=5 if ours else 3,
            linewidth=2.5 if ours else 0.9,
            zorder=3 if ours else 2,
            color="black" if ours else plt.get_cmap("tab20")(number % 20),
            label=arm,
        )
    axes.set_yscale("log")
    axes.set_xlabel("learned: accuracy on the lesson")
    axes.set_ylabel("forgotten: rise of the loss, worst domain")
    axes.set_title(f"{title}: every method at five rates and up")
    axes.legend(fontsize=6, ncols=2, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(out, metadata={"Date": None}, bbox_inches="tight")
    plt.close(figure)
