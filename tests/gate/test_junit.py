"""JUnit XML: what a CI system makes of it."""

from __future__ import annotations

import math
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from holdfast.gate.junit import junit
from holdfast.gate.verdict import Gate, GateResult, decide
from holdfast.meters import Reading

SCHEMA = Path(__file__).parent / "junit.xsd"


def read(name: str, values: list[float], *tags: str) -> Reading:
    items = {str(i): value for i, value in enumerate(values)}
    return Reading("probe", name, "sealed", 0, 0.5, None, len(items), "accuracy", tags=tags,
                   items=items)  # fmt: skip


HALF = [1.0, 0.0] * 500
FALLEN = [0.0] * 500 + HALF[:500]
RESULTS = {
    "PASS": decide([read("a", HALF)], [read("a", HALF)], Gate()),
    "FAIL": decide(
        [read("a", HALF), read("b", HALF)], [read("a", FALLEN), read("b", HALF)], Gate()
    ),
    "INCONCLUSIVE": decide([read("a", HALF[:50])], [read("a", HALF[:50])], Gate()),
    "nothing read": decide([], [], Gate()),
    "missing": decide([read("a", HALF)], [], Gate()),
    "not finite": decide([read("a", HALF)], [read("a", [math.nan, *HALF[1:]])], Gate()),
    "odd names": decide([read('<a&\x00\x1b\ud800"b>', HALF)], [], Gate()),
    "reported": decide(
        [read("a", HALF), read("t", HALF, "target")],
        [read("a", HALF), read("t", FALLEN, "target")],
        Gate(target="report"),
    ),
}


@pytest.mark.parametrize("case", RESULTS)
def test_it_is_green_only_for_a_pass(case: str) -> None:
    result = RESULTS[case]
    root = ET.fromstring(junit(result, "base -> tuned").encode())
    (suite,) = root
    cases = list(suite.iter("testcase"))
    failed = [one for one in cases if one.find("failure") is not None]
    assert suite.get("name") == "base -> tuned"
    assert int(suite.get("tests", "")) == len(cases) == len(result.rows) + 1
    assert int(suite.get("failures", "")) == len(failed)
    assert bool(failed) == (result.verdict != "PASS")
    assert cases[-1].get("name") == "verdict"
    for one, row in zip(cases, result.rows, strict=False):
        assert (one in failed) == (row.decisive and row.verdict != "PASS")
        assert str(row.verdict) in (one.findtext("system-out") or "")
    if failed:
        assert failed[-1].find("failure").get("type") == str(result.verdict)  # type: ignore[union-attr]


@pytest.mark.parametrize("case", RESULTS)
def test_it_keeps_the_common_schema(case: str) -> None:
    """Against the elements and attributes of Jenkins' junit-10.xsd, written out in junit.xsd."""
    etree = pytest.importorskip("lxml.etree")
    schema = etree.XMLSchema(etree.parse(str(SCHEMA)))
    result: GateResult = RESULTS[case]
    document = etree.fromstring(junit(result, case).encode())
    assert schema.validate(document), schema.error_log
    document[0][0].set("verdict", "PASS")  # an attribute that the schema does not know
    assert not schema.validate(document)
