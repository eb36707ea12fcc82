"""The page: a table a lesson, and the frontier of what is learned against what is forgotten."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from arms import ARMS, RATES
from score import REFERENCE, differs, holm, hypervolume, interval, kept, point

Cell = dict[str, Any]
OURS = "holdfast default"
VALIDATION = 100
TITLES = {
    "verbs": "Irregular verbs: a skill",
    "facts": "New facts: emblems",
    "extraction": "A new output format with a skewed label",
    "verbs+extraction": "Two stages: the verbs, then the format",
}


def write_page(cells: Sequence[Cell], out: Path) -> None:
    """Write `out`, and a picture for each lesson beside it."""
    done = [cell for cell in cells if "failed" not in cell]
    hours = sum(cell["seconds"] for cell in done) / 3600
    parts = [
        "# Benchmark: learned against forgotten",
        "",
        f"Made by `python benchmarks/forgetting run` and `... table`; {len(done)} cells, "
        f"{hours:.1f} hours of training on one CPU core, "
        f"{done[0]['steps'] if done else 0} steps each. "
        "Protocol: `benchmarks/forgetting/__main__.py`. "
        "gain: accuracy on the lesson's probe. rise: of the loss on held-out text of the base's "
        "kind, worst of seven domains. fall: of accuracy, worst of the base's seven probes. "
        "Brackets: 95 % two-level bootstrap (seeds, then items). hypervolume: of the frontier of "
        f"the {len(RATES)} rates on the validation seed, reference gain {REFERENCE[0]:g}, rise "
        f"{REFERENCE[1]:.0%}. p: gain less worst fall less worst rise, against {OURS}, Holm over "
        "the arms.",
        "",
    ]
    for lesson, title in TITLES.items():
        some = [cell for cell in done if cell["lesson"] == lesson]
        if some:
            name = f"benchmark-{lesson.replace('+', '-')}.svg"
            parts += [f"## {title}", "", *_table(some), "", f"![{title}]({name})", ""]
            _picture(some, title, out.with_name(name))
    failed = [cell for cell in cells if "failed" in cell]
    if failed:
        parts += ["## Cells that failed", ""]
        parts += [f"- {c['lesson']}, {c['arm']}, x{c['rate']:g}: {c['failed']}" for c in failed]
    out.write_text("\n".join(parts) + "\n", encoding="utf-8")


def _tested(cells: Sequence[Cell], arm: str) -> list[Cell]:
    mine = (c for c in cells if c["arm"] == arm and c["seed"] != VALIDATION)
    return sorted(mine, key=lambda c: int(c["seed"]))


def _table(cells: Sequence[Cell]) -> list[str]:
    """One line an arm, those with test seeds; in the order of their utility."""
    ours = _tested(cells, OURS)
    p = {
        arm: differs(ours, theirs, _utility)[1]
        for arm in ARMS
        if arm != OURS and ours and len(theirs := _tested(cells, arm)) == len(ours)
    }
    adjusted = holm(p)
    heading = (
        "| arm | rate | seeds | gain | worst rise | mean rise | worst fall | lost / won | "
        "left out / replayed | first stage kept | hypervolume | s | MiB | p |"
    )
    lines = []
    for arm in ARMS:
        mine, tried = _tested(cells, arm), [c for c in cells if c["arm"] == arm]
        if not mine:
            continue
        mean, within = _mean(mine), interval(mine)
        stages = [k for k in map(kept, mine) if k is not None]
        frontier = [
            (f["gain"], f["worst rise"])
            for f in (point(c) for c in tried if c["seed"] == VALIDATION)
        ]
        lines.append(
            (
                _utility(mean),
                f"| {arm} | {mine[0]['rate']:g}x | {len(mine)} | "
                + " | ".join(
                    f"{mean[k]:.1%} [{within[k][0]:.1%}, {within[k][1]:.1%}]"
                    for k in ("gain", "worst rise", "mean rise", "worst fall")
                )
                + f" | {mean['lost']:.1%} / {mean['won']:.1%}"
                + f" | {mean['left out rise']:.1%} / {mean['replayed rise']:.1%}"
                + f" | {f'{sum(stages) / len(stages):.0%}' if stages else ''}"
                + f" | {hypervolume(frontier):.3f}"
                + f" | {sum(c['seconds'] for c in mine) / len(mine):.0f}"
                + f" | {sum(c['peak_mib'] for c in mine) / len(mine):.0f}"
                + f" | {f'{adjusted[arm]:.3f}' if arm in adjusted else ''} |",
            )
        )
    return [heading, "|" + "---|" * 14, *(line for _, line in sorted(lines, reverse=True))]


def _mean(cells: Sequence[Cell]) -> dict[str, float]:
    many = [point(cell) for cell in cells]
    return {key: sum(one[key] for one in many) / len(many) for key in many[0]}


def _utility(figures: dict[str, float]) -> float:
    return figures["gain"] - figures["worst fall"] - figures["worst rise"]


def _picture(cells: Sequence[Cell], title: str, out: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "holdfast"
    figure, axes = plt.subplots(figsize=(8, 5))
    for number, arm in enumerate(ARMS):
        tried = [point(c) for c in cells if c["arm"] == arm and c["seed"] == VALIDATION]
        if not tried:
            continue
        tried.sort(key=lambda f: f["gain"])
        ours = arm == OURS
        axes.plot(
            [f["gain"] for f in tried],
            [max(f["worst rise"], 1e-4) for f in tried],
            marker="o",
            markersize=3,
            linewidth=2.5 if ours else 0.9,
            color="black" if ours else plt.get_cmap("tab20")(number % 20),
            label=arm,
        )
    axes.set_yscale("log")
    axes.set_xlabel("learned: accuracy on the lesson")
    axes.set_ylabel("forgotten: rise of the loss, worst domain")
    axes.set_title(title)
    axes.legend(fontsize=6, ncols=2, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(out, metadata={"Date": None}, bbox_inches="tight")
    plt.close(figure)
