"""`training.extra`: further fields of transformers' TrainingArguments, checked by name and by type."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Mapping
from typing import Any

from pocl.recipe.arguments import DECIDED, place_of_argument


def check_extra(extra: Mapping[str, Any]) -> None:
    """Refuses names that `POCLConfig` lacks or the recipe sets elsewhere, and values of another type.

    Raises:
        ValueError: names the field, and what to write.
    """
    if not extra:
        return
    from pydantic import ConfigDict, PydanticSchemaGenerationError, TypeAdapter, ValidationError

    from pocl.trainer import POCLConfig

    known = {field.name for field in dataclasses.fields(POCLConfig) if field.init}
    hints = typing.get_type_hints(POCLConfig)
    for name, value in extra.items():
        if name in DECIDED:
            raise ValueError(f"training.extra: {name} is decided by the recipe already; {place_of_argument(name)}")
        if name not in known:
            nearest = difflib.get_close_matches(name, known - set(DECIDED), n=1)
            hint = f"; did you mean {nearest[0]}?" if nearest else ""
            raise ValueError(f"training.extra: transformers' TrainingArguments have no field {name}{hint}")
        try:
            TypeAdapter(hints[name], config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value)
        except ValidationError as error:
            said = error.errors()[0]["msg"].replace("Input should be", "must be")
            raise ValueError(f"training.extra: {name} {said}, got {value!r}") from None
        except PydanticSchemaGenerationError:  # a type of transformers' own, which judges it itself
            continue
