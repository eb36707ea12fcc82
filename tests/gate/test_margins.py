"""The recipe's gate section: units, defaults, which margin a reading takes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from holdfast.gate.margins import DEFAULT_MARGINS, Gate, Margin


@pytest.mark.parametrize(
    ("text", "amount", "unit"),
    [("3pt", 3, "pt"), ("1%", 1, "%"), (" 0.5 pt ", 0.5, "pt"), (".25%", 0.25, "%")],
)
def test_margins_are_a_number_with_a_unit(text, amount, unit):
    assert Margin.parse(text) == Margin(amount, unit)


@given(st.floats(1e-6, 100), st.sampled_from(["pt", "%"]))
def test_a_resolved_recipe_reads_back_the_same(amount, unit):
    text = str(Margin(amount, unit))
    assert Margin.parse(text).amount == pytest.approx(amount, rel=1e-11)
    gate = Gate(margins={"x": text})
    assert Gate.model_validate(gate.model_dump()) == gate


@pytest.mark.parametrize("bare", [3, 3.0, "3", "0.5"])
def test_a_bare_number_is_refused_with_values_that_work(bare):
    with pytest.raises(ValidationError, match="has no unit") as refused:
        Gate(margins={"gsm8k": bare})
    (problem,) = refused.value.errors()
    assert problem["loc"] == ("margins", "gsm8k")
    assert f"{bare}pt" in problem["msg"]
    assert f"{bare}%" in problem["msg"]


def test_a_margin_of_the_wrong_sign_is_told_apart():
    with pytest.raises(ValidationError, match=r"-1pt has the wrong sign.*write 1pt"):
        Gate(margins={"gsm8k": "-1pt"})


@pytest.mark.parametrize("wrong", ["2 points", "pt", "", None, True, ["2pt"], "nan%"])
def test_what_is_no_margin_is_refused(wrong):
    with pytest.raises(ValidationError, match=r"not a margin.*2pt.*1%"):
        Gate(margins={"gsm8k": wrong})


@pytest.mark.parametrize("wrong", ["0pt", "0.0%", "101pt"])
def test_a_margin_outside_its_range_is_refused(wrong):
    with pytest.raises(ValidationError, match=r"outside \(0, 100\].*0\.5"):
        Gate(margins={"gsm8k": wrong})


@pytest.mark.parametrize(
    ("meter", "name", "unit", "tags", "expected"),
    [
        ("probe", "gsm8k", "accuracy", (), "3pt"),
        ("probe", "gsm8k_cot", "accuracy", (), "3pt"),
        ("probe", "mmlu/law", "accuracy", (), "2pt"),
        ("probe", "multilingual:de", "accuracy", (), "1pt"),
        ("probe", "mine", "accuracy", (), "2pt"),
        ("probe", "mine", "accuracy", ("rare",), "2pt"),
        ("probe", "mine", "nats", (), "5%"),
        ("probe", "wiki", "nats", ("control",), "5%"),
        ("canary", "code", "nats", ("canary",), "1%"),
        ("canary", "multilingual", "nats", (), "1%"),  # the probe's 1pt does not fit a loss
    ],
)
def test_defaults(meter, name, unit, tags, expected):
    found = Gate().margin_for(meter, name, unit, tags)
    assert found is not None
    assert str(found[0]) == expected
    assert found[1] in DEFAULT_MARGINS


def test_the_most_particular_key_of_the_recipe_wins():
    gate = Gate(margins={"canary": "2%", "code": "3%", "canary/code_c": "4%", "mmlu": "1pt"})

    def margin(meter: str, name: str, unit: str) -> str:
        found = gate.margin_for(meter, name, unit)
        assert found is not None
        return str(found[0])

    assert margin("canary", "web", "nats") == "2%"
    assert margin("canary", "code", "nats") == "3%"
    assert margin("canary", "code_python", "nats") == "3%"
    assert margin("canary", "code_c", "nats") == "4%"
    assert margin("probe", "mmlu_law", "accuracy") == "1pt"
    assert margin("probe", "code", "accuracy") == "2pt"  # 3% is for losses
    assert gate.margin_for("probe", "code", "norm") is None


@pytest.mark.parametrize("alpha", [0, 0.5, -1])
def test_alpha_is_a_level(alpha):
    with pytest.raises(ValidationError):
        Gate(alpha=alpha)


def test_absolute_margins():
    assert Margin.parse("2pt").absolute(0.7) == pytest.approx(0.02)
    assert Margin.parse("1%").absolute(2.5) == pytest.approx(0.025)
