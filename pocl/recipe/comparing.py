"""The section of a recipe for `pocl compare`, and what all sections have in common."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    ValidationInfo,
    field_validator,
    model_validator,
)


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Python counts true as 1; a recipe does not."""
        given = value if isinstance(value, (list, tuple)) else [value]
        if any(isinstance(part, bool) for part in given):
            annotation = str(cls.model_fields[str(info.field_name)].annotation)
            if not re.search(r"\bbool\b|\bAny\b|dict", annotation):
                raise ValueError(f"takes no true and no false, got {value}")
        return value


def _as_arms(value: Any) -> Any:
    """A mapping is a list of arms as well."""
    if isinstance(value, Mapping):
        return tuple({name: own} for name, own in value.items())
    return tuple(value.replace(",", " ").split()) if isinstance(value, str) else value


def _as_seeds(value: Any) -> Any:
    """A number of seeds stands for 1 to that number."""
    return tuple(range(1, value + 1)) if isinstance(value, int) and not isinstance(value, bool) else value


class CompareSection(Section):
    """What `pocl compare` puts side by side."""

    arms: Annotated[tuple[str | dict[str, dict[str, Any] | None], ...], BeforeValidator(_as_arms)] = ("plain", "pocl")
    """Named arms (`pocl compare --help` explains them), and arms of your own, `name: {from: pocl, section.key: value}`.
    The first is compared with, or `plain` if it is among them."""
    seeds: Annotated[tuple[NonNegativeInt, ...], BeforeValidator(_as_seeds), Field(min_length=1)] = (1, 2, 3, 4, 5)
    """How many seeds, or a list of them; a seed draws samples and their order in the stages."""
    equal: Literal["steps", "own"] = "steps"
    """What arms have in common: as many optimizer steps as the recipe's own stages make, or nothing: every arm trains
    as long as its own recipe says."""
    across: dict[str, tuple[Any, ...]] = {}
    """One setting and values of it, as in `{loss.divergence: [fkl, skew_rkl]}`: every arm is run at each, and compared
    at each."""

    @model_validator(mode="after")
    def _sensible(self) -> CompareSection:
        if len(self.across) > 1:
            raise ValueError(
                f"across takes one setting, got {', '.join(self.across)}; make the others arms of their own"
            )
        if any(not values or len(set(map(str, values))) < len(values) for values in self.across.values()):
            raise ValueError("across needs values that differ, as in {loss.divergence: [fkl, skew_rkl]}")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds names one twice: {', '.join(map(str, self.seeds))}")
        return self
