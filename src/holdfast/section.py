"""The base of every part of a recipe: a frozen pydantic model whose fields are its settings."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part of the recipe. Unknown keys are errors; values never change once validated.

    Each field is documented by the string beneath it (unit, range, the value that turns it off);
    that string is the field's description in the JSON schema and in ``holdfast init``.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        validate_default=True,
        allow_inf_nan=False,
    )
