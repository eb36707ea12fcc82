"""Refusals: responses that decline. A few teach when to decline; many teach to decline too often.

A response counts where one of the patterns stands at its beginning, before the end of the first
sentence or so. The list is short and holds English, Spanish, French, German, Portuguese, Italian,
Chinese and Japanese wordings: a share of zero means that none of these was found, not that nothing
is refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from holdfast.data.quality.finding import Finding, Quality, Sample, graded

BEGINNING = 120
"""Characters of a response that are looked at."""
_PATTERNS = (
    r"\bI(?:'m| am) (?:very |really |so )?sorry,? (?:but|I (?:can|won))",
    r"\bI(?:'m| am) (?:unable|not able) to (?:help|assist|provide|answer|comply|do that)",
    r"\bI (?:can(?:'t|not)|won't|will not) (?:help|assist|provide|answer|comply|do that|share)",
    r"\bI must (?:decline|refuse)",
    r"\bAs an AI(?: language)? (?:model|assistant)\b",
    r"\blo siento,? pero no puedo\b|\bno puedo (?:ayudarte|ayudar|proporcionar)\b",
    r"\bje suis désolée?,? mais\b|\bje ne peux pas (?:vous |t')?(?:aider|fournir|répondre)\b",
    r"\bes tut mir leid,? aber\b|\b(?:dabei )?kann ich (?:dir|ihnen) (?:dabei )?nicht helfen\b",
    r"\bdesculpe,? mas\b|\bnão posso (?:ajudar|fornecer)\b",
    r"\bmi dispiace,? ma non posso\b|\bnon posso (?:aiutarti|fornire)\b",
    "(?:抱歉|对不起|很抱歉).{0,6}(?:不能|无法)",
    "申し訳(?:ありません|ございません)",
)
REFUSAL = re.compile("|".join(_PATTERNS), re.IGNORECASE)


def refusals(samples: Sequence[Sample], quality: Quality) -> list[Finding]:
    """Responses that decline."""
    rows = [sample.where for sample in samples if refuses(sample.response)]
    share = len(rows) / len(samples)
    return graded(
        "refusals",
        share,
        quality.refusals,
        f"{len(rows)} responses ({share:.1%}) refuse",
        "read them; keep those that are right, and answer or delete the others",
        rows,
    )


def refuses(response: str) -> bool:
    """Whether a response begins by declining."""
    return REFUSAL.search(response[:BEGINNING].replace("\u2019", "'")) is not None
