"""What every section of a config shares: strict types, no unknown keys, immutable, documented fields."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Base of all sections. A field's docstring is its documentation; `rlhf-ray config` prints it."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)
