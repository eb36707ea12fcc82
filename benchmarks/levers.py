"""Each lever alone and the default stack on the lab: what is learned, what is left, what it costs.

    python benchmarks/levers.py --cells FILE.jsonl                     # every cell that is missing
    python benchmarks/levers.py --cells FILE.jsonl --only ewc --rate 2  # untuned
    python benchmarks/levers.py --cells FILE.jsonl --table             # what is there so far

Every arm starts from the same base and reads as many lesson tokens in as many steps: 256 a step,
anchor and replay rows besides. Its learning rate is tuned first, on seed 0 and on the selection
halves of the lesson's held-out rows and of the canary: of three rates, and one beyond if the best
lies at an edge, the one that forgets least of those that bring the lesson to `EQUAL` nats. Where
none does, higher ones are tried up to `HIGHEST`, and the one that learns most is taken. (Tuned for
the lesson alone, naive takes a rate at which nothing of the base is left.) Each arm then runs at
its rate on seeds that no rate was chosen on.

Arms still differ in what they learn. Hence loss and canary are read along the way, too (their
selection halves): `canary at equal loss` is the rise where a run's held-out loss first came down to
`--at` nats, as though it had been stopped there. `rewind` is no training of its own: it is naive's
end on each seed, scaled back along the straight line to the base until its loss is that.

Each cell is a line in `--cells`, written when it is done; one that is there is not run again.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig

from holdfast.checkpoint import load_checkpoint
from holdfast.demo import LENGTH, NAIVE, lab_recipe
from holdfast.lab import base_path, write_files
from holdfast.recipe import Recipe
from holdfast.run import train

LESSON_TOKENS, EVERY = 256, 90
LAST = 4 * EVERY
"""The last reading on the way; one step more ends the run, at a learning rate of almost zero.
361 steps: in 133 the default stack had not learned the lesson yet (2026-11-25-levers.txt)."""
STEPS = LAST + 1
CHEAP = [
    f"train.steps={STEPS}",
    f"train.measure_every={EVERY}",
    "train.save_every=100000",
    "data.heldout=0.1",
    "gate.enabled=false",  # the table has the differences; so few items decide no margin
    "alarms=none",
]
BARE = [*LENGTH, "levers.adapter=none", "levers.budget.spike=0"]
TWICE = f"train.batch_tokens={2 * LESSON_TOKENS}"
REPLAY = [*BARE, TWICE, "levers.replay.sources=[{replay}]", "levers.replay.fraction=0.5"]
NAIVE_ARM, TENTH, REWIND = "naive", "naive, a tenth of its rate", "rewind (of naive)"
LORA = [*NAIVE, "levers.adapter.method=lora"]
ARMS: dict[str, list[str]] = {
    NAIVE_ARM: NAIVE,
    "default stack": [*LENGTH, TWICE],
    "replay, ntp": [*REPLAY, "levers.kl_anchor=none", "levers.replay.own_pretraining=true"],
    "replay, kl": [*REPLAY, "levers.kl_anchor.self_generated.fraction=0"],
    "kl_anchor on task rows": [*NAIVE, "levers.kl_anchor.weight=1", "levers.kl_anchor.on=task"],
    "ewc": [*NAIVE, "levers.ewc.weight=20"],
    "l2_sp": [*NAIVE, "levers.l2_sp.weight=0.1"],
    "adapter (all-linear)": [*LORA, "levers.adapter.target=all-linear"],
    "adapter (MLP)": LORA,
    "budget (cap 0.05)": [*NAIVE, "levers.budget.cap=0.05"],
    TENTH: NAIVE,
    "token_gate eaft": [*NAIVE, "levers.token_gate.method=eaft"],
    "token_gate flow": [*NAIVE, "levers.token_gate.method=flow"],
    "token_gate dft": [*NAIVE, "levers.token_gate.method=dft"],
    "token_gate stm": [*NAIVE, "levers.token_gate.method=stm"],
    "freeze (embeddings, first 2)": [
        *NAIVE,
        "levers.freeze.presets=[embeddings]",
        "levers.freeze.first_blocks=2",
    ],
    "context_frozen": [*NAIVE, "levers.context_frozen.enabled=true"],
    "optimizer (decay to base)": [*NAIVE, "levers.optimizer.decay_to_base=30"],
}
"""The default stack on so small a model is full fine-tuning with `kl_anchor` on rows that the base
writes, and the spike rule: it is also the arm of `kl_anchor` on anchor rows."""
RATES = (1.0, 2.0, 4.0)
"""Times the automatic rate of the arm's mode: 2.5e-4 in full, 2.5e-3 for LoRA."""
HIGHEST = 16.0
"""Where an arm that learns too little is given up."""
TUNED_ON = 0
EQUAL = 1.0
"""Nats a token on held-out lesson rows; 10.3 before."""
SCALES = [i / 16 for i in range(2, 17)]

Cell = dict[str, Any]


def main(
    cells: Annotated[Path, typer.Option(help="JSON lines, one a cell; continued if it is there.")],
    only: Annotated[str | None, typer.Option(help="This arm alone.")] = None,
    rate: Annotated[float | None, typer.Option(help="Do not tune: take this rate.")] = None,
    seeds: Annotated[int, typer.Option(help="Seeds 1 to this.")] = 3,
    at_most: Annotated[int, typer.Option(help="Cells to run before stopping.")] = 10_000,
    table: Annotated[bool, typer.Option(help="Print what is there, run nothing.")] = False,
    at: Annotated[float, typer.Option(help="Held-out loss to compare the canary at.")] = EQUAL,
    threads: int = 1,
) -> None:
    """Fill the cells that are missing, then print the table."""
    if only not in (None, *ARMS):
        raise typer.BadParameter(f"'{only}' is none of: {', '.join(ARMS)}")
    torch.set_num_threads(threads)
    done = read_cells(cells)
    for arm in ARMS if not table else ():
        while at_most > 0 and only in (None, arm):
            cell = next(_missing(arm, done, rate, seeds), None)
            if cell is None:
                break
            at_most -= 1
            found = [cell | result for result in _run(cell)]
            done += found
            with cells.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(one) + "\n" for one in found)
            print(json.dumps(found[0]), flush=True)
    Console(width=170).print(_table(done, at))
    ran = {cell["arm"] for cell in done if not cell["tuning"]}
    print("not run yet:", "; ".join(arm for arm in ARMS if arm not in ran) or "none")


def read_cells(path: Path) -> list[Cell]:
    """The cells of a file; none where there is no file yet."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _missing(arm: str, done: list[Cell], rate: float | None, seeds: int) -> Iterator[Cell]:
    """What an arm still needs, in the order it must run: tuning, then the seeds."""
    ran = {cell["seed"] for cell in done if cell["arm"] == arm and not cell["tuning"]}
    chosen = rate or chosen_rate(NAIVE_ARM if arm == TENTH else arm, done)
    if isinstance(chosen, str):
        if arm != TENTH:
            yield {"arm": arm, "tuning": True, "rate": float(chosen), "seed": TUNED_ON}
        return
    times = chosen / 10 if arm == TENTH else chosen
    for seed in range(1, seeds + 1):
        if seed not in ran:
            yield {"arm": arm, "tuning": False, "rate": times, "seed": seed}


def chosen_rate(arm: str, done: list[Cell]) -> float | str:
    """The rate that forgets least of those that learn enough; as a string, one to be tried yet."""
    tuned = {cell["rate"]: cell for cell in done if cell["arm"] == arm and cell["tuning"]}
    for rate in RATES:
        if rate not in tuned:
            return str(rate)
    enough = [rate for rate, cell in tuned.items() if cell["selection"] <= EQUAL]
    if enough:
        best = min(enough, key=lambda rate: tuned[rate]["selection_canary"])
        beyond = {RATES[0]: best / 2, RATES[-1]: best * 2}.get(best, best)
    else:
        best = min(tuned, key=lambda rate: tuned[rate]["selection"])
        beyond = min(2 * best, HIGHEST)
    return best if beyond in tuned else str(beyond)


def _run(cell: Cell) -> list[Cell]:
    """One training, read whole; while tuning only the selection half. After naive, its rewind."""
    with TemporaryDirectory() as scratch:
        files = write_files(Path(scratch) / "data", seed=cell["seed"])
        _thin(files["probes"])
        words = [*CHEAP, *(word.format(replay=files["replay"]) for word in ARMS[cell["arm"]])]
        words.append("canary.max_documents=8")
        if cell["tuning"]:
            words.append(f"train.measure_every={LAST}")
        recipe = lab_recipe(files, Path(scratch) / "run", words, seed=cell["seed"])
        rate = cell["rate"] * recipe.levers.budget.peak(
            AutoConfig.from_pretrained(recipe.model.path),
            recipe.levers.adapter.method not in ("none", "auto"),
        )
        recipe = _with(recipe, rate, cell["tuning"])
        cpu = time.process_time()
        result = train(recipe, watch=lambda *_: None)  # so the lesson is read on the way, too
        cpu = time.process_time() - cpu
        lines = (result.folder / "readings.jsonl").read_text(encoding="utf-8").splitlines()
        readings = [json.loads(line) for line in lines]
        base_canary = _at(readings, "canary", "selection", 0)
        found = {
            "selection": _at(readings, "lesson", "selection", LAST)["heldout"],
            "selection_canary": _rise(base_canary, _at(readings, "canary", "selection", LAST)),
            "learning_rate": rate,
            "seconds": round(cpu, 1),
            "displacement": result.summary["relative_displacement"],
            "refused": len(result.summary["refused_steps"]),
        }
        if cell["tuning"]:
            return [found]
        # the base's loss is read on the sealed half alone
        path = [[0, _at(readings, "lesson", "sealed", 0)["heldout"], 0.0]]
        path += [
            [
                step,
                _at(readings, "lesson", "selection", step)["heldout"],
                _rise(base_canary, _at(readings, "canary", "selection", step)),
            ]
            for step in range(EVERY, STEPS, EVERY)
        ]
        probes = [r for r in readings if r["meter"] == "probe"]
        before, after = ({r["name"]: r for r in probes if r["step"] == s} for s in (0, STEPS))
        sealed = [_at(readings, "canary", "sealed", step) for step in (0, STEPS)]
        found |= {
            "target": after["irregular_verbs"]["value"],
            "over_application": after["over_application"]["value"],
            "capabilities": {
                name: after[name]["value"] - one["value"]
                for name, one in before.items()
                if one["unit"] == "accuracy" and not {"target", "adoption"} & set(one["tags"])
            },
            "canary": {name: sealed[1][name] / value - 1 for name, value in sealed[0].items()},
            "heldout": _at(readings, "lesson", "sealed", STEPS)["heldout"],
            "path": path,
        }
        if cell["arm"] != NAIVE_ARM:
            return [found]
        rewound = _rewound(recipe, result.folder / "model", base_canary)
        return [found, {"arm": REWIND, "path": rewound}]


def _thin(probes: Path) -> None:
    """Half of the items; all of the target and of over-application, which are fewer."""
    lines = probes.read_text(encoding="utf-8").splitlines()
    whole = {"target", "adoption"}
    kept = [
        line for i, line in enumerate(lines) if i % 2 == 0 or whole & set(json.loads(line)["tags"])
    ]
    probes.write_text("\n".join(kept) + "\n", encoding="utf-8")


def _with(recipe: Recipe, rate: float, tuning: bool) -> Recipe:
    """The recipe at this peak rate; while tuning, without probes."""
    given = recipe.model_dump()
    given["levers"]["budget"]["learning_rate"] = rate
    if tuning:
        given["probes"] = []
    return Recipe.model_validate(given)


def _at(readings: list[Cell], meter: str, split: str, step: int) -> dict[str, float]:
    return {
        r["name"]: r["value"]
        for r in readings
        if (r["meter"], r["split"], r["step"]) == (meter, split, step)
    }


def _rise(before: Mapping[str, float], after: Mapping[str, float]) -> float:
    """Mean over the domains of the relative rise."""
    return statistics.mean(after[name] / value - 1 for name, value in before.items())


def _rewound(recipe: Recipe, tuned: Path, base_canary: Mapping[str, float]) -> list[list[float]]:
    """[scale, held-out loss, canary rise] from base to tuned, on the selection halves."""
    from holdfast.between import FINEST, Line, Tensors
    from holdfast.data.chat import encode_all
    from holdfast.data.rows import iter_rows
    from holdfast.measure import text_documents
    from holdfast.meters.canary import document, read_canary
    from holdfast.prepare import split_heldout

    base, end = (
        load_checkpoint(name, str(path), None, "float32")
        for name, path in (("BASE", base_path()), ("TUNED", tuned))
    )
    length = recipe.data.max_length or 256
    canary = text_documents(recipe.canary, end.tokenizer, length)
    with TemporaryDirectory() as scratch:
        rows, _ = encode_all(
            iter_rows(recipe.data.sources[0]),
            end.tokenizer,
            max_length=length,
            cache_dir=Path(scratch),
            fingerprint="lesson",
        )
        _, held = split_heldout(rows, recipe.data.heldout, recipe.seed)
        lesson = [
            document(row["input_ids"], row["loss_mask"], "heldout")
            for row in map(rows.__getitem__, held)
        ]
    line, found = Line(Tensors.of(base, end), end), []
    for scale in SCALES:
        model = line.model(round(scale * FINEST))
        rises = {r.name: r.value for r in read_canary(model, canary, "selection", 0)}
        (loss,) = read_canary(model, lesson, "selection", 0, meter="lesson")
        found.append([scale, loss.value, _rise(base_canary, rises)])
    return found


def at_equal_loss(cell: Cell, loss: float) -> float | None:
    """Canary rise where a path's held-out loss first is `loss`; None where it never is.

    Between the two readings around it, on the straight line in the logarithm of the loss.
    """
    path = cell["path"]
    for (_, high, before), (_, low, after) in pairwise(path):
        if low <= loss < high:
            share = math.log(high / loss) / math.log(high / low)
            return float(before + share * (after - before))
    return None


def _table(done: list[Cell], at: float) -> Table:
    """A row an arm: mean and standard deviation over its seeds."""
    table = Table(
        title=f"each lever alone on the lab, {STEPS} steps of {LESSON_TOKENS} lesson tokens: "
        "mean ± standard deviation over the seeds"
    )
    for column in ("arm", "rate", "seeds", "held-out loss", "target", "over-applied"):
        table.add_column(column)
    for column in ("mean capability", "worst capability", "mean canary", "worst canary"):
        table.add_column(column)
    for column in (f"canary at equal loss ({at:g})", "CPU s"):
        table.add_column(column)
    for arm in (*ARMS, REWIND):
        runs = [cell for cell in done if cell["arm"] == arm and not cell["tuning"]]
        equal = _shown(runs, lambda c: at_equal_loss(c, at), "+.1%")
        tuned = chosen_rate(NAIVE_ARM if arm in (TENTH, REWIND) else arm, done)
        if not runs:
            continue
        if arm == REWIND:
            table.add_row(arm, "", str(len(runs)), *[""] * 7, equal, "")
        else:
            table.add_row(
                arm,
                f"{runs[0]['learning_rate']:.2g}{', not tuned' if isinstance(tuned, str) else ''}",
                str(len(runs)),
                _shown(runs, lambda c: c["heldout"], ".3f"),
                _shown(runs, lambda c: c["target"], ".1%"),
                _shown(runs, lambda c: 1 - c["over_application"], ".1%"),
                _shown(runs, lambda c: statistics.mean(c["capabilities"].values()), "+.1%"),
                _shown(runs, lambda c: min(c["capabilities"].values()), "+.1%"),
                _shown(runs, lambda c: statistics.mean(c["canary"].values()), "+.1%"),
                _shown(runs, lambda c: max(c["canary"].values()), "+.1%"),
                equal,
                f"{statistics.mean(c['seconds'] for c in runs):.0f}",
            )
    return table


def _shown(runs: list[Cell], of: Callable[[Cell], float | None], how: str) -> str:
    """Mean and spread of what is there; `2 of 3` where some runs have none."""
    values = [value for value in map(of, runs) if value is not None]
    if not values:
        return "never"
    spread = f" ± {statistics.stdev(values):{how.lstrip('+')}}" if len(values) > 1 else ""
    some = f" ({len(values)} of {len(runs)})" if len(values) < len(runs) else ""
    return f"{statistics.mean(values):{how}}{spread}{some}"


if __name__ == "__main__":
    typer.run(main)
