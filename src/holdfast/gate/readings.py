"""A finished run, judged again from its own readings: other margins, nothing is computed.

`verdict.json` holds the hashes of the readings, the items and the artifact's weights as the run
wrote them. Where one of them is another now, the readings are not those of this model.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from holdfast.artifact import RunFolder
from holdfast.errors import RequestError
from holdfast.gate.beforehand import Capability, hashes, require_known
from holdfast.gate.looks import look
from holdfast.gate.margins import Gate
from holdfast.gate.release import Release
from holdfast.gate.verdict import decide, is_judged, standing
from holdfast.meters import Reading, Split
from holdfast.meters.probes import load_items


def judge_run(run: Path, gate: Gate | None = None) -> Release:
    """The verdict on a finished run.

    Args:
        run: its folder.
        gate: margins; None: the run's own.

    Raises:
        RequestError: the run has not ended, or its readings, items, weights or probe files are not
            those that it ended with.
    """
    folder = RunFolder.open(run)
    recipe = folder.read_recipe()
    record = _verdict(folder)
    _require_its_own(folder, record)
    probes = [str(path) for path in recipe.get("probes") or []]
    _require_same_probes(probes, str(recipe["resolved"].get("probes_sha256", "")), run)
    gate = gate or Gate.model_validate({**(recipe.get("gate") or {}), "enabled": True})
    before, after = _readings(folder)
    require_known(gate, [Capability.of(reading) for reading in before])
    resolved, base = recipe["resolved"], recipe["model"]["path"]
    about = {
        "base": {"path": base, "weights_sha256": resolved["weights_sha256"]},
        "tuned": {"path": str(run)},
        "items": "as the run read them",
        "sha256": record["sha256"],
    }
    looks = look(base, str(run), load_items(probes), before, resolved["weights_sha256"])
    verdict = standing(decide(before, after, gate), record.get("rows", ()), gate)
    return Release(verdict, looks, about)


def _verdict(folder: RunFolder) -> dict[str, Any]:
    file = folder.path / "verdict.json"
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        sound = isinstance(record["sha256"], dict) and "items.jsonl" in record["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        sound = False
    if not sound:
        raise RequestError(
            f"'{folder.path}' holds no verdict.json with the hashes of its readings, so the run "
            "has not ended or another holdfast wrote it; judge the models themselves: "
            f"holdfast gate BASE {folder.path}"
        )
    return record  # type: ignore[no-any-return]


def _require_its_own(folder: RunFolder, record: dict[str, Any]) -> None:
    now = folder.hashes()
    if changed := sorted(
        name
        for name in record["sha256"].keys() | now.keys()
        if now.get(name) != record["sha256"].get(name)
    ):
        raise RequestError(
            f"'{folder.path / changed[0]}' is not what this run ended with (its hash is another "
            "than verdict.json has): the readings are those of another run; judge the models "
            f"themselves: holdfast gate BASE {folder.path}"
        )


def _require_same_probes(paths: list[str], recorded: str, run: Path) -> None:
    now, then = hashes(paths), recorded.split()
    if len(then) != len(paths):
        raise RequestError(
            f"'{run / 'recipe.yaml'}' names {len(paths)} probe files ({', '.join(paths)}), and the "
            f"run was read with {len(then)}; restore it, or judge the models themselves: holdfast "
            f"gate BASE {run}"
        )
    for path, sha in zip(paths, then, strict=True):
        if now.get(path) != sha:
            what = "has changed since" if path in now else "is no longer there as"
            raise RequestError(
                f"probes: '{path}' {what} '{run}' was read with it; restore it, or judge the "
                f"models themselves: holdfast gate BASE {run}"
            )


def _readings(folder: RunFolder) -> tuple[list[Reading], list[Reading]]:
    """What the gate judged of the sealed split, before and after, with single items."""
    tags = {(r["meter"], r["name"]): tuple(r["tags"]) for r in folder.records()}
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    # not splitlines: an answer may hold a line separator of Unicode's
    for line in (folder.path / "items.jsonl").read_text(encoding="utf-8").split("\n")[:-1]:
        item = json.loads(line)
        key = item["meter"], item["name"]
        if item["split"] == "sealed" and is_judged(item["meter"], tags.get(key, ())):
            groups[key].append(item)
    return _side(groups, tags, "before"), _side(groups, tags, "after")


def _side(
    groups: dict[tuple[str, str], list[dict[str, Any]]],
    tags: dict[tuple[str, str], tuple[str, ...]],
    side: str,
) -> list[Reading]:
    sealed: Split = "sealed"
    return [
        Reading(
            meter=meter,
            name=name,
            split=sealed,
            step=int(side == "after"),
            value=sum(i[side] for i in items) / len(items),
            stderr=None,
            n=len(items),
            unit=items[0]["unit"],
            tags=tags.get((meter, name), ()),
            items={i["id"]: i[side] for i in items},
            clusters={i["id"]: i["cluster"] for i in items},
        )
        for (meter, name), items in groups.items()
    ]
