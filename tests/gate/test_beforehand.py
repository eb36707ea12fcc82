"""What a gate refuses before anything is computed.

Expected numbers: with no changed answer Tango's lower bound is -z^2 / (n + z^2) in closed form.
"""

from __future__ import annotations

from statistics import NormalDist

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import RequestError
from holdfast.gate.beforehand import (
    Capability,
    capabilities,
    content,
    require_apart,
    require_decidable,
    require_known,
)
from holdfast.gate.margins import Gate
from holdfast.gate.verdict import decide
from holdfast.meters import Reading
from holdfast.meters.probes import Item


def items(n: int, probe: str = "sums", clusters: int | None = None, **more: object) -> list[Item]:
    return [
        Item.model_validate(
            {"id": str(i), "probe": probe, "kind": "exact", "prompt": f"{i} + 1 =",
             "target": str(i + 1), "cluster": str(i % clusters) if clusters else None, **more}
        )
        for i in range(n)
    ]  # fmt: skip


def of(n: int, **more: object) -> list[Capability]:
    return capabilities(items(n, **more), {})  # type: ignore[arg-type]


@given(st.integers(1, 3000), st.sampled_from([0.01, 0.05, 0.1]), st.floats(0.5, 20))
def test_too_few_items_are_told_by_the_closed_form(n: int, alpha: float, points: float) -> None:
    margin = round(points, 1)
    z2 = NormalDist().inv_cdf(alpha) ** 2
    gate = Gate(alpha=alpha, margins={"sums": f"{margin}pt"})
    if abs(z2 / (n + z2) - margin / 100) < 1e-6:
        return
    if z2 / (n + z2) < margin / 100:
        require_decidable(gate, of(n))
        return
    with pytest.raises(RequestError, match="could never pass") as refused:
        require_decidable(gate, of(n))
    needed = int(str(refused.value).split("give at least ")[1].split()[0])
    assert z2 / (needed + z2) < margin / 100 + 1e-9
    assert z2 / (needed - 1 + z2) >= margin / 100 - 1e-9


@given(st.integers(1, 400), st.integers(1, 40))
def test_what_is_let_through_passes_where_nothing_changed(n: int, clusters: int) -> None:
    """And what is refused would not have: the gate itself is asked."""
    gate = Gate(margins={"sums": "5pt"})
    some = items(n, clusters=clusters)
    values = {item.id: 0.0 for item in some}
    reading = Reading("probe", "sums", "sealed", 0, 0.0, None, n, "accuracy", items=values,
                      clusters={item.id: item.cluster or "" for item in some})  # fmt: skip
    passes = decide([reading], [reading], gate).verdict == "PASS"
    try:
        require_decidable(gate, capabilities(some, {}))
        assert passes
    except RequestError:
        assert not passes


def test_one_document_decides_nothing() -> None:
    with pytest.raises(RequestError, match="wiki: 1 sealed document could never pass"):
        require_decidable(Gate(), capabilities([], {"wiki": ["a"]}))
    require_decidable(Gate(), capabilities([], {"wiki": ["a", "b"]}))


def test_no_item_at_all_is_refused() -> None:
    with pytest.raises(RequestError, match="wiki: 0 sealed documents"):
        require_decidable(Gate(), capabilities([], {"wiki": []}))


@pytest.mark.parametrize(("rule", "refused"), [("rise", True), ("report", False)])
def test_a_target_that_could_not_be_shown_to_rise(rule: str, refused: bool) -> None:
    one_cluster = of(5, clusters=1, tags=["target"])
    gate = Gate.model_validate({"target": rule})
    if refused:
        with pytest.raises(RequestError, match="could not show a rise"):
            require_decidable(gate, one_cluster)
    else:
        require_decidable(gate, one_cluster)


def test_a_probe_that_is_only_reported_may_be_small() -> None:
    require_decidable(Gate(), of(3, tags=["adoption"]))
    with pytest.raises(RequestError, match="could never pass"):
        require_decidable(Gate(adoption="guard"), of(3, tags=["adoption"]))


@pytest.mark.parametrize(
    ("margins", "said"),
    [
        ({"smus": "2pt"}, "did you mean 'sums'?"),
        ({"wiki": "2pt"}, "write wiki: 2%"),
        ({"rare": "2pt"}, "'rare' names nothing"),
        ({"canry": "1%"}, "did you mean 'canary'?"),
    ],
)
def test_an_unknown_capability_is_named_with_what_was_meant(
    margins: dict[str, str], said: str
) -> None:
    with pytest.raises(RequestError) as refused:
        require_known(Gate(margins=margins), capabilities(items(3), {"wiki": ["a"]}))
    assert said in str(refused.value)


def test_families_kinds_and_units_are_known() -> None:
    read = capabilities([*items(3), *items(3, "mmlu_law", tags=["rare"])], {"wiki": ["a"]})
    known = {"sums": "2pt", "mmlu": "2pt", "rare": "2pt", "canary": "1%", "canary/wiki": "1%",
             "accuracy": "3pt"}  # fmt: skip
    require_known(Gate(margins=known), read)


def test_the_same_question_under_another_name_is_the_same() -> None:
    one, other = items(2)[0], items(2, "dev", tags=["rare"], cluster="x")[0]
    assert content(one) == content(other) != content(items(2)[1])
    with pytest.raises(RequestError, match=r"1 items.*sums/0 \(= dev/0\)"):
        require_apart(items(4), [other])
    require_apart(items(4), items(9)[4:])
