"""What every section of the configuration is made of: strict types, names, topics."""

from __future__ import annotations

import re
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$"
TOPIC_PATTERN = r"^[^#+\x00]{1,200}$"
Name = Annotated[str, Field(pattern=NAME_PATTERN)]
Topic = Annotated[str, Field(pattern=TOPIC_PATTERN)]
Priority = Annotated[int, Field(ge=1, le=10)]
ClassName = Literal["realtime", "near", "interactive", "batch"]


class Substituted(str):
    """Text that came from `${…}`: the only text that is read as a number or as true and false."""

    __slots__ = ()


class Section(BaseModel):
    """A strict part of the tree: unknown keys are refused, and so are values of another type.

    `timeout_ms: "50"` and `port: true` are mistakes, not a number; `enabled: 1` is not a truth value. A whole number
    will do where a fraction is allowed. Only what `${…}` stands for, which is always text, is read as what its key
    takes. Values of `EDGE_AGENT__…` variables are YAML, so they have types of their own.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, hide_input_in_errors=True)

    @field_validator("*", mode="before")
    @classmethod
    def _type_as_meant(cls, value: object, info: ValidationInfo) -> object:
        field = cls.model_fields[info.field_name or ""]
        allowed = {field.annotation, *get_args(field.annotation)}  # also of a Literal
        if allowed & {int, float, 0} and (isinstance(value, bool) or type(value) is str):
            raise ValueError(_not_a_number(value, info.field_name or ""))
        if bool in allowed and not isinstance(value, bool | Substituted):
            raise ValueError("must be true or false")
        return value


def _not_a_number(value: object, key: str) -> str:
    if isinstance(value, str) and re.fullmatch(r"\s*[\d.]+\s*[A-Za-zµ%]+\s*", value):
        named = key.endswith(("_ms", "_s", "_bytes"))
        return f"must be a number without a unit{'; the unit is in the name of the key' if named else ''}"
    quoted = isinstance(value, str) and re.fullmatch(r"\s*-?[\d.]+\s*", value)
    return "must be a number without quotes" if quoted else "must be a number"
