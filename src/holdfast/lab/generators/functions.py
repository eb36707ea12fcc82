"""Small Python functions whose docstring says what the return line must be."""

from __future__ import annotations

from random import Random

from holdfast.lab.domain import Domain, Example

NUMBERS = ("x", "y", "n", "m", "value", "number", "amount", "price", "score", "level")
LISTS = ("items", "values", "numbers", "scores", "prices", "rows", "records", "points")
TEXTS = ("text", "name", "word", "line", "title", "label", "message", "phrase")

_ON_NUMBER = (
    ("add", "{a} plus {c}", "{a} + {c}"),
    ("subtract", "{a} minus {c}", "{a} - {c}"),
    ("multiply", "{a} times {c}", "{a} * {c}"),
    ("is_above", "whether {a} is greater than {c}", "{a} > {c}"),
    ("is_below", "whether {a} is less than {c}", "{a} < {c}"),
    ("is_multiple", "whether {a} is a multiple of {c}", "{a} % {c} == 0"),
    ("at_least", "the larger of {a} and {c}", "max({a}, {c})"),
    ("at_most", "the smaller of {a} and {c}", "min({a}, {c})"),
)
_ON_TWO_NUMBERS = (
    ("total", "the sum of {a} and {b}", "{a} + {b}"),
    ("difference", "{a} minus {b}", "{a} - {b}"),
    ("product", "the product of {a} and {b}", "{a} * {b}"),
    ("larger", "the larger of {a} and {b}", "max({a}, {b})"),
    ("smaller", "the smaller of {a} and {b}", "min({a}, {b})"),
    ("same", "whether {a} is equal to {b}", "{a} == {b}"),
)
_ON_LIST = (
    ("first", "the first {c} of {a}", "{a}[:{c}]"),
    ("skip", "{a} without the first {c}", "{a}[{c}:]"),
    ("count_above", "how many of {a} are greater than {c}", "sum(i > {c} for i in {a})"),
    ("raise_all", "all of {a} plus {c}", "[i + {c} for i in {a}]"),
    ("scale_all", "all of {a} times {c}", "[i * {c} for i in {a}]"),
    ("has_more", "whether {a} has more than {c} elements", "len({a}) > {c}"),
)
_ON_TEXT = (
    ("repeat", "{a} repeated {c} times", "{a} * {c}"),
    ("start", "the first {c} letters of {a}", "{a}[:{c}]"),
    ("longer_than", "whether {a} has more than {c} letters", "len({a}) > {c}"),
    ("upper_start", "the first {c} letters of {a} in upper case", "{a}[:{c}].upper()"),
)
_FAMILIES = (
    (NUMBERS, _ON_NUMBER),
    (NUMBERS, _ON_TWO_NUMBERS),
    (LISTS, _ON_LIST),
    (TEXTS, _ON_TEXT),
)


def example(rng: Random) -> Example:
    """Write one function; the target is what follows `return`."""
    names, operations = rng.choice(_FAMILIES)
    verb, meaning, expression = rng.choice(operations)
    first, second = rng.sample(names, 2)
    constant = rng.randint(2, 99)
    two = operations is _ON_TWO_NUMBERS
    name = f"{verb}_{first}_{second}" if two else f"{verb}_{first}_{constant}"
    parameters = f"{first}, {second}" if two else first
    fill = {"a": first, "b": second, "c": constant}
    prompt = f'def {name}({parameters}):\n    """Return {meaning.format(**fill)}."""\n    return'
    return Example(prompt, f" {expression.format(**fill)}", key=name, cluster=name)


DOMAIN = Domain("functions", share=0.12, example=example, length=(2, 3), separator="\n\n\n")
