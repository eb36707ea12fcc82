"""A verdict as JUnit XML, for the test tab of a CI system: a test case a capability.

FAIL and INCONCLUSIVE are failures (of that `type`): whatever is not shown to be kept must not show
green. Rows that are reported only never fail. A last case, `verdict`, holds the whole: it fails
where no single row does, such as where nothing was guarded.

Schema: Jenkins' junit-10.xsd (the xUnit plugin's), which GitLab and GitHub's actions read too.
"""

from __future__ import annotations

import re
from xml.etree import ElementTree as ET

from holdfast.gate.render import show_difference, show_interval, show_margin, show_value
from holdfast.gate.verdict import GateResult, Row, Verdict

_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What XML 1.0 has no place for; names come from users."""


def junit(result: GateResult, name: str, seconds: float = 0.0) -> str:
    """The document, with its declaration.

    Args:
        result: the verdict.
        name: of the suite, such as what was judged.
        seconds: that it took.
    """
    cases = [_row(row) for row in result.rows]
    cases.append(_case("verdict", "gate", result.verdict, result.reason, decisive=True))
    counts = {
        "tests": str(len(cases)),
        "failures": str(sum(case.find("failure") is not None for case in cases)),
        "errors": "0",
        "skipped": "0",
        "time": f"{seconds:.3f}",
    }
    suites = ET.Element("testsuites", {"name": "holdfast gate", **_without(counts, "skipped")})
    suite = ET.SubElement(suites, "testsuite", {"name": _plain(name), **counts})
    suite.extend(cases)
    ET.indent(suites)
    text = ET.tostring(suites, encoding="unicode")
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{text}\n'


def _row(row: Row) -> ET.Element:
    case = _case(row.name, f"gate.{row.kind}", row.verdict, row.reason, decisive=row.decisive)
    change = f"{show_difference(row.difference, row.unit)} {show_interval(row)}".strip()
    ET.SubElement(case, "system-out").text = _plain(
        f"before {show_value(row.before, row.before_stderr, row.unit)}, "
        f"after {show_value(row.after, row.after_stderr, row.unit)}, change {change}, "
        f"margin {show_margin(row)}, {row.n} items, {row.verdict}: {row.reason}"
    )
    return case


def _case(name: str, group: str, verdict: Verdict, reason: str, *, decisive: bool) -> ET.Element:
    case = ET.Element("testcase", {"classname": group, "name": _plain(name), "time": "0"})
    if decisive and verdict is not Verdict.PASS:
        failure = ET.SubElement(
            case, "failure", {"type": str(verdict), "message": _plain(f"{verdict}: {reason}")}
        )
        failure.text = _plain(reason)
    return case


def _plain(text: str) -> str:
    return _NOT_XML.sub("\ufffd", text)


def _without(values: dict[str, str], key: str) -> dict[str, str]:
    return {name: value for name, value in values.items() if name != key}
