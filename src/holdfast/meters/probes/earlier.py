"""What the stages before a run were read by, asked again: what they taught is now to stay."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from holdfast.lineage import Stage
from holdfast.meters.probes.items import Item, Tag, load_items


def earlier_items(
    stage: Stage, own: Sequence[Item], *, run_code: bool
) -> tuple[list[Item], list[str]]:
    """Items of the run that came to a stage, its targets as guardrails; and what is not asked.

    Args:
        stage: where training starts.
        own: items that the run itself names; a probe that is among them is its own.
        run_code: whether answers that are code may be run.

    Raises:
        RequestError: a file is there and is not one of items any more.
    """
    paths: list[str] = stage.recipe().get("probes", [])
    there = [path for path in paths if Path(path).is_file()]
    names = {item.probe for item in own}
    items = [item for item in load_items(there) if item.probe not in names]
    asked = [_to_stay(item) for item in items if run_code or item.kind != "code"]
    return asked, [
        *(
            f"the model was judged by {path}, which is not there any more: whether that stays is "
            "not judged; give its items in probes, tagged guardrail"
            for path in paths
            if path not in there
        ),
        *(
            f"the model was judged by '{probe}', which runs what it writes: not judged here "
            "without train.run_generated_code: true"
            for probe in sorted({item.probe for item in items} - {item.probe for item in asked})
        ),
        *(
            f"no probe asks for what the model was taught before ({source['path']}): whether it "
            "stays is not judged; give one in probes, tagged guardrail"
            for source in stage.taught()[:1]
            if not paths and not any("guardrail" in item.tags for item in own)
        ),
    ]


def _to_stay(item: Item) -> Item:
    tags: list[Tag] = ["guardrail" if tag == "target" else tag for tag in item.tags]
    return item.model_copy(update={"tags": [*dict.fromkeys(tags)]})
