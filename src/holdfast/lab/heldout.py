"""What is held out of the lab's training text, decided by hash and so by construction.

Two things are held out.  A *canary* document is one whose text falls in one fixed class out of
fifty: training text never contains it.  A *reserved* example (an operand pair, a sentence, a
record) is one that only probes may use: no document, canary or not, is ever written with it.
"""

from __future__ import annotations

import hashlib

CANARY_CLASSES = 50
RESERVED_CLASSES = 8


def _class(key: str, classes: int) -> int:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()) % classes


def is_canary(text: str) -> bool:
    """Whether this document text is held out of training for good."""
    return _class(text, CANARY_CLASSES) == 0


def is_reserved(key: str) -> bool:
    """Whether the example this key stands for is kept for probes."""
    return _class(f"reserved/{key}", RESERVED_CLASSES) == 0
