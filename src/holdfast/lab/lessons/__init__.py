"""The lab's lessons, one module each: a skill, facts, and a format with a skewed label."""

from __future__ import annotations

from holdfast.lab.lessons import extraction, facts, verbs
from holdfast.lab.lessons.lesson import Lesson

LESSONS: dict[str, Lesson] = {
    "verbs": verbs.LESSON,
    "facts": facts.LESSON,
    "extraction": extraction.LESSON,
}
"""Every lesson by its name."""

__all__ = ["LESSONS", "Lesson"]
