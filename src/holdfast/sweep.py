"""A search over any settings of a recipe: target up, worst guardrail down.

Each trial is a run of the recipe with some settings changed, read on the **selection** split only:
no trial looks at what the gate judges, and the recommended recipe has its verdict still before it.

    target   the mean accuracy of target probes where the selection half of probes is read
             (`train.measure_probes`), else minus the lesson's held-out loss in nats
    worst    the largest fall of a guardrail, in margins: 1 is all that is accepted

Optuna (TPE, several objectives) proposes; it offers no pruning for several objectives, so the rule
is our own. From half of its steps on a trial is given up where it
    is hopeless:   `worst` is beyond HOPELESS margins, or
    is dominated:  a finished trial had at that time more target and a lower worst.

What a trial draws depends on (seed, number of the trial) and on the trials finished before it.

Source: Akiba et al. 2019 (Optuna); Ozaki et al. 2022 (TPE for several objectives).
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from holdfast.errors import RequestError
from holdfast.files import full_disk_named, write_text
from holdfast.gate.verdict import Gate
from holdfast.meters import Reading
from holdfast.points import judged
from holdfast.recipe import Recipe, load_recipe
from holdfast.space import Axis

HOPELESS = 8.0
"""Margins. From half of the steps on the worst rise has been seen to halve, not to fall to an
eighth."""
HALF = 0.5
MARK = ".sweep"
"""A file that says whose folder it is."""


@dataclass(frozen=True)
class Trial:
    """A point of the search that ran to its end."""

    number: int
    settings: dict[str, Any]
    target: float
    worst: float
    culprit: str

    @property
    def within(self) -> bool:
        """Whether every guardrail is estimated to be within its margin."""
        return self.worst <= 1

    @property
    def words(self) -> str:
        """The settings that were searched over, as one writes them."""
        return " ".join(f"{key}={value}" for key, value in self.settings.items())


@dataclass(frozen=True)
class Swept:
    """What a sweep came to."""

    trials: tuple[Trial, ...]
    """Those that ran to their end, by number."""
    frontier: tuple[Trial, ...]
    """Those that no other beats in both, least target first."""
    recommended: Trial | None
    """The most target within every margin; None: no trial is within."""
    pruned: int
    seconds: float


class _EndedError(Exception):
    """Ends a trial: with its reading, or given up."""

    def __init__(self, found: tuple[float, float, str] | None) -> None:
        self.found = found


def sweep(
    recipe: Path | None,
    words: Sequence[str],
    axes: Sequence[Axis],
    out: Path,
    *,
    trials: int = 16,
    minutes: float | None = None,
    storage: str | None = None,
    study: str = "sweep",
    seed: int = 0,
    console: Console | None = None,
) -> Swept:
    """Search, and write frontier, picture and a recipe for each point on it to `out`.

    Args:
        recipe: the recipe that is varied, and `words`, `key=value` settings over it.
        axes: what is varied (`space.py`).
        out: a folder; of an earlier call the search goes on.
        trials: of the whole study, those of other machines and earlier calls counted.
        minutes: no trial begins that would end later than that, by the longest one so far.
        storage: a database that machines share, such as postgresql://...; None: a file in `out`.
        study: its name in the database.
        seed: of what is proposed; each trial trains with the recipe's own seed.

    Raises:
        RequestError: optuna is not there; the recipe, an end of an axis or the database cannot be
            used; the study is one of another recipe or space.
    """
    started = time.perf_counter()
    console = console or Console(quiet=True)
    optuna = _optuna()
    _check_ends(recipe, words, axes)
    _claim(out)
    url = storage or f"sqlite:///{out.resolve() / 'study.db'}"
    found = _study(optuna, url, study, _digest(recipe, words, axes))
    longest = 0.0
    while (
        _counted(optuna, found) < trials
        and not _late(started, longest, minutes)
    ):  # fmt: skip
        begun = time.perf_counter()
        trial = found.ask()
        found.sampler = _sampler(optuna, seed, trial.number)
        settings = {axis.key: axis.suggested(trial) for axis in axes}
        trial.set_user_attr("settings", settings)
        line = " ".join(axis.word(settings[axis.key]) for axis in axes)
        console.print(f"trial {trial.number}: {line}", highlight=False, markup=False)
        one = _run(recipe, [*words, *(axis.word(settings[axis.key]) for axis in axes)],
                   out / f"trial-{trial.number}", trial, _halves(optuna, found))  # fmt: skip
        if one is None:
            found.tell(trial, state=optuna.trial.TrialState.PRUNED)
            console.print("  given up")
        else:
            target, worst, culprit = one
            trial.set_user_attr("culprit", culprit)
            found.tell(trial, [target, worst])
            console.print(f"  target {target:.4g}, {culprit} at {worst:.2f} of its margin",
                          highlight=False, markup=False)  # fmt: skip
        longest = max(longest, time.perf_counter() - begun)
    result = _result(optuna, found, time.perf_counter() - started)
    _write(result, recipe, words, axes, out)
    return result


def _claim(out: Path) -> None:
    """Make the folder, or refuse one that holds something else: trials are removed from it."""
    if out.is_dir() and any(out.iterdir()) and not (out / MARK).is_file():
        raise RequestError(
            f"--out: '{out}' is not empty and no sweep wrote it; give a folder that does not exist "
            "yet"
        )
    with full_disk_named(out):
        out.mkdir(parents=True, exist_ok=True)
    write_text(out / MARK, "holdfast sweep keeps its trials here, and removes them.\n")


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise RequestError(
            "holdfast sweep needs optuna, which is not installed: pip install 'holdfast[sweep]'"
        ) from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def _sampler(optuna: Any, seed: int, number: int) -> Any:
    """TPE whose draws know only (seed, number): the same wherever and whenever it is asked."""
    import numpy as np

    state = np.random.SeedSequence([seed, number]).generate_state(1)
    return optuna.samplers.TPESampler(seed=int(state[0]), n_startup_trials=6)


def _study(optuna: Any, url: str, name: str, digest: str) -> Any:
    """The study of this name, made where there is none. Raises where it is another search's."""
    try:
        found = optuna.create_study(
            storage=url, study_name=name, directions=["maximize", "minimize"], load_if_exists=True
        )
    except Exception as error:  # whatever a database's driver raises
        why = str(error).splitlines()[0]
        raise RequestError(
            f"--storage: the database cannot be used ({type(error).__name__}: {why}); give a URL "
            "such as sqlite:////shared/study.db"
        ) from error
    asked = found.user_attrs.get("asked")
    if asked is None:
        found.set_user_attr("asked", digest)
    elif asked != digest:
        raise RequestError(
            f"--study: '{name}' is a search over another recipe or other settings; give another "
            "--study, or another --out"
        )
    return found


def _digest(recipe: Path | None, words: Sequence[str], axes: Sequence[Axis]) -> str:
    """What a study must have in common; not where it is written to."""
    settings = load_recipe(recipe, words).model_dump(mode="json", exclude={"out"})
    text = json.dumps([settings, [asdict(axis) for axis in axes]], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _check_ends(recipe: Path | None, words: Sequence[str], axes: Sequence[Axis]) -> None:
    """Refuse now what would be refused at some later trial: all of it at once."""
    load_recipe(recipe, words)
    problems: list[str] = []
    for axis in axes:
        for value in axis.ends():
            end = int(value) if axis.whole else value
            try:
                load_recipe(recipe, [*words, axis.word(end)])
            except RequestError as error:
                problems += error.problems
    if problems:
        raise RequestError(*dict.fromkeys(problems))


def _late(started: float, longest: float, minutes: float | None) -> bool:
    return minutes is not None and time.perf_counter() - started + longest > 60 * minutes


def _counted(optuna: Any, study: Any) -> int:
    """Trials that are over, whoever ran them; one that was killed is run anew, as another."""
    over = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
    return len(study.get_trials(deepcopy=False, states=over))


def _halves(optuna: Any, study: Any) -> list[tuple[float, float]]:
    """Target and worst of the finished trials when half of their steps were done."""
    done = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
    return [tuple(one.user_attrs["half"]) for one in done if "half" in one.user_attrs]


def _run(
    recipe: Path | None,
    words: Sequence[str],
    folder: Path,
    trial: Any,
    halves: Sequence[tuple[float, float]],
) -> tuple[float, float, str] | None:
    """Target, worst and culprit of one trial; None where it was given up. Its folder is removed."""
    from holdfast.run import train

    asked = load_recipe(recipe, words, out=str(folder))
    seen = False

    def watch(before: Sequence[Reading], now: Sequence[Reading], done: float) -> None:
        nonlocal seen
        found = scored(before, now, asked.gate)
        if done >= 1:
            raise _EndedError(found)
        if done < HALF:
            return
        if not seen:
            seen = True
            trial.set_user_attr("half", list(found[:2]))
            if dominated(found[:2], halves):
                raise _EndedError(None)
        if not found[1] <= HOPELESS:
            raise _EndedError(None)

    shutil.rmtree(folder, ignore_errors=True)
    try:
        train(asked, watch=watch)
    except _EndedError as ended:
        return ended.found
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    raise AssertionError("a watched run ends with what was read")


def scored(
    before: Sequence[Reading], now: Sequence[Reading], gate: Gate
) -> tuple[float, float, str]:
    """Target, worst fall in margins and whose it is, on the selection split.

    Raises:
        RequestError: there is nothing learned to read, or nothing to keep.
    """
    after = [r for r in now if r.split == "selection"]
    guards = [_same_items(one, after) for one in before if one.split == "selection"]
    guards = [one for one in guards if one.items and "target" not in one.tags]
    accuracies = [r.value for r in after if "target" in r.tags and r.unit == "accuracy"]
    losses = [-r.value for r in after if r.meter == "lesson"]
    if not accuracies and not losses:
        raise RequestError(
            "nothing to search by was read: hold rows of the lesson out (data.heldout above 0, 32 "
            "rows or more), or give target probes and train.measure_probes: true"
        )
    if not guards:
        raise RequestError(
            "nothing to keep was read; give held-out text: canary.sources, or leave it out"
        )
    learned = accuracies or losses
    kept = {(r.meter, r.name) for r in guards}
    gate = gate.model_copy(update={"margins": _fitting(gate, guards)})
    point = judged(0, "", guards, [r for r in after if (r.meter, r.name) in kept], gate, "estimate")
    return sum(learned) / len(learned), point.worst, point.culprit


def _same_items(before: Reading, after: Sequence[Reading]) -> Reading:
    """The base's reading on the items that were read again: a glance may take a part of them."""
    again = {i for r in after if (r.meter, r.name) == (before.meter, before.name) for i in r.items}
    return replace(
        before,
        items={i: value for i, value in before.items.items() if i in again},
        clusters={i: cluster for i, cluster in before.clusters.items() if i in again},
    )


def _fitting(gate: Gate, guards: Sequence[Reading]) -> dict[str, str]:
    """The margins that something read here falls under: others would fail as promises unkept."""
    used = (gate.margin_for(r.meter, r.name, r.unit, r.tags) for r in guards)
    keys = {margin[1] for margin in used if margin}
    return {key: text for key, text in gate.margins.items() if key in keys}


def dominated(point: Sequence[float], others: Sequence[Sequence[float]]) -> bool:
    """Whether one of the others has more target and a lower worst."""
    return any(target > point[0] and worst < point[1] for target, worst in others)


def _result(optuna: Any, study: Any, seconds: float) -> Swept:
    states = optuna.trial.TrialState
    done = [
        Trial(
            one.number,
            one.user_attrs["settings"],
            one.values[0],
            one.values[1],
            one.user_attrs["culprit"],
        )
        for one in study.get_trials(deepcopy=False, states=(states.COMPLETE,))
    ]
    best = frontier(done)
    within = [one for one in best if one.within]
    return Swept(
        tuple(done),
        tuple(best),
        max(within, key=lambda one: one.target) if within else None,
        len(study.get_trials(deepcopy=False, states=(states.PRUNED,))),
        seconds,
    )


def frontier(trials: Sequence[Trial]) -> list[Trial]:
    """Those that no other is as good as in both and better in one, least target first."""
    best = [
        one
        for one in trials
        if not any(
            other.target >= one.target
            and other.worst <= one.worst
            and (other.target, other.worst) != (one.target, one.worst)
            for other in trials
        )
    ]
    return sorted(best, key=lambda one: (one.target, one.number))


def _write(
    result: Swept, recipe: Path | None, words: Sequence[str], axes: Sequence[Axis], out: Path
) -> None:
    """`frontier.json`, `frontier.html`, and a recipe for each point on it."""
    from holdfast.report.sweep import picture

    recipes = out / "recipes"
    shutil.rmtree(recipes, ignore_errors=True)
    recipes.mkdir()
    for one in result.frontier:
        text = _text(recipe, words, axes, one, out)
        write_text(recipes / f"trial-{one.number}.yaml", text)
        if one is result.recommended:
            write_text(out / "recommended.yaml", text)
    if result.recommended is None:
        (out / "recommended.yaml").unlink(missing_ok=True)
    points = [asdict(one) | {"on_frontier": one in result.frontier,
                             "recommended": one is result.recommended}
              for one in result.trials]  # fmt: skip
    write_text(out / "frontier.json", json.dumps(points, indent=2) + "\n")
    if result.trials:
        write_text(out / "frontier.html", picture(result.trials, result.frontier,
                                                  result.recommended))  # fmt: skip


def _text(
    recipe: Path | None, words: Sequence[str], axes: Sequence[Axis], one: Trial, out: Path
) -> str:
    """The recipe of a trial, to be run as it is: with its verdict, on the sealed split."""
    given = [axis.word(one.settings[axis.key]) for axis in axes]
    asked: Recipe = load_recipe(recipe, [*words, *given], out=str(out / f"run-{one.number}"))
    settings = asked.model_dump(mode="json", exclude_unset=True)
    head = (
        f"# trial {one.number} of a sweep; on the selection split: target {one.target:.4g}, "
        f"{one.culprit} at {one.worst:.2f} of its margin\n"
    )
    return head + yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
