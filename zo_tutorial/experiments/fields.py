"""What the groups of a config are made of: a strict group of keys, names out of a list, and common limits."""

from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError, core_schema

from zo_tutorial.queries import QUERY_MODES
from zo_tutorial.selection import LAYER_TYPES


class Group(BaseModel):
    """A group of keys. An unknown key, or a value of another type, is an error."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, values):
        if not isinstance(values, dict):
            raise PydanticCustomError("no_group", "should be a group of keys: {keys}", {"keys": _keys(cls)})
        for key in values:
            if key not in cls.model_fields:
                context = {"key": key, "keys": _keys(cls)}
                raise PydanticCustomError("unknown_key", "unknown key; allowed: {keys}", context)
        return values


def _keys(group: type[BaseModel]) -> str:
    return ", ".join(group.model_fields)


class In:
    """A name out of some, as Literal has it, though they are listed elsewhere."""

    def __init__(self, names: Iterable[str]):
        self.names = list(names)

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        return core_schema.literal_schema(self.names)


# Limits that several groups share.
LearningRate = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, lt=1)]  # [0, 1)
Probability = Annotated[float, Field(ge=0, le=1)]
NUMBER, MODULES = "<number>", "<modules>"  # pydantic puts these tags among the keys that lead to an error
ByModule = Annotated[
    Annotated[Probability, Tag(NUMBER)] | Annotated[dict[str, Probability], Field(min_length=1), Tag(MODULES)],
    Discriminator(lambda value: MODULES if isinstance(value, dict) else NUMBER),
]
LayerTypes = Annotated[
    list[Annotated[str, In(LAYER_TYPES)]],
    BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
    Field(description="layer types that are trained, one name or a list of names; none named: all of these"),
]
Positive = Annotated[float, Field(gt=0)]
Number = Annotated[float, Field(ge=0)]
QueryMode = Annotated[str, In(QUERY_MODES), Field(description="how losses are evaluated; auto: the fastest valid way")]
