"""English articles."""

from __future__ import annotations

from holdfast.lab.wording import indefinite


def test_the_article_goes_by_the_first_letter():
    assert [indefinite(word) for word in ("owl", "fox", "orange fox")] == [
        "an owl", "a fox", "an orange fox"
    ]  # fmt: skip
