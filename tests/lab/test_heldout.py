"""What is held out stays the same for ever: a base has been trained on it."""

from __future__ import annotations

from holdfast.lab.heldout import CANARY_CLASSES, RESERVED_CLASSES, is_canary, is_reserved


def test_the_classes_have_the_size_they_are_said_to_have():
    keys = [str(number) for number in range(20_000)]
    assert abs(sum(map(is_canary, keys)) / len(keys) - 1 / CANARY_CLASSES) < 0.005
    assert abs(sum(map(is_reserved, keys)) / len(keys) - 1 / RESERVED_CLASSES) < 0.01


def test_a_canary_need_not_be_reserved():
    keys = [str(number) for number in range(20_000)]
    canaries = [key for key in keys if is_canary(key)]
    assert 0 < sum(map(is_reserved, canaries)) < len(canaries) / 4


def test_held_out_now_is_held_out_for_good():
    assert [n for n in range(300) if is_canary(str(n))] == [74, 87, 111, 181, 188, 245, 268]
    assert [n for n in range(30) if is_reserved(str(n))] == [1, 9, 12, 18, 25]
