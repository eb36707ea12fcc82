"""A tiny base that is known through and through, and a lesson to fine-tune it with.

The base was pretrained on generated text of known proportions, so what it knew before a
fine-tuning run, and what it should still know after it, can be counted.
"""

from __future__ import annotations

from pathlib import Path

from holdfast.lab.corpus import Document, corpus
from holdfast.lab.files import write_files

__all__ = ["Document", "base_path", "corpus", "write_files"]


def base_path() -> Path:
    """The folder of the embedded base, a transformers model with its tokenizer."""
    return Path(__file__).parent / "base"
