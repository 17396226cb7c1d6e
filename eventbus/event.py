"""What is an event, and which events there are.

An event is a fact in the past tense: a frozen pydantic model with a name and a version. The one rule: how an event
becomes bytes and bytes become an event is decided here, and no error of that holds the event's data.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import traceback
import typing
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any, ClassVar, NoReturn, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Secret, SecretBytes, SecretStr, ValidationError
from pydantic.alias_generators import to_snake
from pydantic.errors import PydanticUserError
from pydantic_core import to_json as any_to_json
from typing_extensions import is_typeddict

from eventbus import serializing
from eventbus.errors import EnvelopeError, SetupError

M = TypeVar("M", bound=BaseModel)

_WORD = r"[a-z][a-z0-9]*(?:_[a-z0-9]+)*"
_NAME = re.compile(rf"{_WORD}(?:\.{_WORD})*")
_VERSION_WORD = re.compile(r"v[0-9]+")
_VERSION_SUFFIX = re.compile(r"(.+)_v_?([0-9]+)")  # to_snake makes `_v_2` of `OrderPlaced_v2`
_TYPE = re.compile(r"(.+)\.v([1-9][0-9]{0,8})", re.DOTALL)
# A routing key is 255 bytes at most, and a delayed event's holds 24 delay words and `publish.` in front of its type.
LONGEST_TYPE = 190
_OURS = ("event_name", "event_version", "event_type")
# An error header is short; ten places are enough to see what is wrong.
_MOST_PLACES = 10


class Event(BaseModel):
    """A fact that others may want to know: subclass it, in the past tense, and give it fields.

    Frozen. Unknown fields are ignored, so that a sender may add some; inf and nan are refused; bytes travel as
    base64; fields travel under their alias and are read by alias and by name.

    Class keywords: *name*, snake_case words joined by dots (the class's own name in snake_case if left out; not
    inherited), and *version*, bumped only for a change that an old reader would misread.

    Raises:
        SetupError: at class creation, for a name, version or field that cannot be.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="ignore",
        allow_inf_nan=False,
        # `constants` writes what is no JSON where `null` would silently change the data; `to_json` refuses it.
        ser_json_inf_nan="constants",
        ser_json_bytes="base64",
        val_json_bytes="base64",
        serialize_by_alias=True,
        validate_by_alias=True,
        validate_by_name=True,
        hide_input_in_errors=True,
    )

    event_name: ClassVar[str]
    event_version: ClassVar[int]
    event_type: ClassVar[str]

    def __init_subclass__(cls, *, name: str | None = None, version: int = 1) -> None:
        super().__init_subclass__()
        # `Page[int]` is made by pydantic, not by a class statement: it is `Page`, read with that parameter.
        if "[" in cls.__name__:
            return
        for taken in _OURS:
            # Annotated alone, pydantic would first warn of a field that shadows the parent's attribute.
            annotated = cls.__dict__.get("__annotations__", ())  # noqa: RUF063  # to evaluate them now could fail
            if taken in cls.__dict__ or taken in annotated:
                _refuse_field(cls, taken)
        cls.event_name = _derived_name(cls) if name is None else _checked_name(cls, name)
        cls.event_version = _checked_version(cls, version)
        cls.event_type = f"{cls.event_name}.v{cls.event_version}"
        if len(cls.event_type) > LONGEST_TYPE:
            raise SetupError(
                f"{_where(cls)}: the event type {cls.event_type!r} has {len(cls.event_type)} characters, "
                f"a routing key has room for {LONGEST_TYPE}: give a shorter name"
            )

    @classmethod
    def __pydantic_init_subclass__(cls, **_: object) -> None:
        super().__pydantic_init_subclass__()
        for taken in _OURS:
            if taken in cls.model_fields:
                _refuse_field(cls, taken)
        _refuse_secrets(cls)


def _where(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _refuse_field(cls: type, field: str) -> NoReturn:
    keyword = {"event_name": "name='...'", "event_version": "version=..."}.get(field, "name='...', version=...")
    raise SetupError(
        f"{_where(cls)}: {field!r} is taken by the event's own {field}: rename the field, "
        f"or say class {cls.__name__}(Event, {keyword}) if you meant that"
    )


def _derived_name(cls: type) -> str:
    name = to_snake(cls.__name__).strip("_")
    if versioned := _VERSION_SUFFIX.fullmatch(name):
        stem, digits = versioned.groups()
        raise SetupError(
            f"{_where(cls)}: {name!r} would be another event, not another version: "
            f"say name={stem!r}, version={int(digits)}"
        )
    return _checked_name(cls, name)


def _checked_name(cls: type, name: object) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise SetupError(
            f"{_where(cls)}: {name!r} is not an event name: "
            "give snake_case words joined by dots, like name='order_placed' or name='shop.order_placed'"
        )
    last = name.rpartition(".")[2]
    if _VERSION_WORD.fullmatch(last):
        raise SetupError(
            f"{_where(cls)}: the name {name!r} ends in {last!r}, which would be read as its version: "
            f"say version={int(last[1:])} and name the event without it"
        )
    return name


def _checked_version(cls: type, version: object) -> int:
    if isinstance(version, bool) or not isinstance(version, int) or not 1 <= version < 10**9:
        raise SetupError(f"{_where(cls)}: {version!r} is not a version: give a whole number from 1, like version=2")
    return version


# ── secrets: they serialise as asterisks, so an event with one would arrive without it ──────────────


def _refuse_secrets(cls: type[BaseModel]) -> None:
    for name, field in cls.model_fields.items():
        if secret := _secret_in(field.annotation, set()):
            raise SetupError(
                f"{_where(cls)}.{name} holds a {secret}, which would be published as asterisks: "
                "leave it out, or send a reference to where the secret is kept"
            )


def _secret_in(annotation: object, seen: set[int]) -> str | None:
    """The name of a secret type somewhere in *annotation*, models and dataclasses within included."""
    if id(annotation) in seen:
        return None
    seen.add(id(annotation))
    origin = get_origin(annotation) or annotation
    if isinstance(origin, type) and issubclass(origin, SecretStr | SecretBytes | Secret):
        return origin.__name__
    inner = (_secret_in(part, seen) for part in _parts(annotation, origin))
    return next((found for found in inner if found), None)


def _parts(annotation: object, origin: object) -> Iterator[object]:
    """The annotations that *annotation* is made of."""
    yield from get_args(annotation)
    for alias_of in ("__value__", "__supertype__"):  # `type X = ...` and NewType
        if hasattr(annotation, alias_of):
            yield getattr(annotation, alias_of)
    if not isinstance(origin, type):
        return
    if issubclass(origin, BaseModel):
        yield from (field.annotation for field in origin.model_fields.values())
    elif dataclasses.is_dataclass(origin) or is_typeddict(origin) or hasattr(origin, "_fields"):
        try:
            yield from typing.get_type_hints(origin).values()
        except NameError:  # a forward reference that only its own module can resolve
            return


# ── event <-> JSON ──────────────────────────────────────────────────────────────────────────────────


def to_json(event: BaseModel) -> bytes:
    """*event* as JSON, in one pass.

    Raises:
        EnvelopeError: something in it does not serialise; the error names the place and the kind, never the value.
    """
    try:
        data = serializing.to_json(event)
    except Exception:  # noqa: BLE001  # nothing is known yet: its own serialiser may have warned of something, no more
        data = _to_json_or_why(event)
    # Found anywhere, it may be in a string: only then is it worth a parse. One letter is found ten times as fast.
    if (b"N" in data or b"I" in data) and (b"NaN" in data or b"Infinity" in data):
        _refuse_constants(type(event), data)
    return data


def _to_json_or_why(event: BaseModel) -> bytes:
    """As `to_json`; here a warning is a warning."""
    try:
        return event.__pydantic_serializer__.to_json(event, warnings="error")
    except Exception:  # noqa: BLE001  # a field's own serialiser may raise anything; its message may hold the data
        raise EnvelopeError(f"{_title(type(event))} does not serialise: {_culprit(event)}") from None


def from_json(model: type[M], data: bytes) -> M:
    """*data* read as *model*.

    Raises:
        EnvelopeError: with the reason `invalid-data`; it names places and kinds, never a value.
        SetupError: *model* is not fully defined.
    """
    try:
        return model.__pydantic_validator__.validate_json(data)  # type: ignore[no-any-return]
    except Exception as error:  # noqa: BLE001  # a validator's own bug: the same data will meet it again
        refusal = refusal_of(model, error)
    # Not chained: the cause may quote the data, and its traceback would be printed with this one's.
    raise refusal


def refusal_of(model: type[BaseModel], error: Exception) -> EnvelopeError | SetupError:
    """What to raise, outside of the `except`, where data were read as *model* and that raised *error*: see above."""
    if isinstance(error, PydanticUserError):
        return SetupError(f"{_where(model)} is not fully defined: call {model.__name__}.model_rebuild()")
    why = _places(model, error) if isinstance(error, ValidationError) else _bug(error)
    return EnvelopeError(f"the data does not fit {_title(model)}: {why}", reason="invalid-data")


def _title(model: type[BaseModel]) -> str:
    event_type = getattr(model, "event_type", None)
    return f"{model.__name__} ({event_type})" if event_type else model.__name__


def _places(model: type[BaseModel], error: ValidationError) -> str:
    problems = error.errors(include_url=False, include_input=False)
    known = _schema_words(model)
    said = [_place(problem["loc"], known) + _kind(problem) for problem in problems[:_MOST_PLACES]]
    if len(problems) > _MOST_PLACES:
        said.append(f"and {len(problems) - _MOST_PLACES} more")
    return "; ".join(said)


def _place(location: Iterable[int | str], known: frozenset[str]) -> str:
    # A dictionary's keys are data too: only the schema's own words are repeated.
    words = [str(part) if isinstance(part, int) or part in known else "*" for part in location]
    return f"{'.'.join(words)}: " if words else ""


def _kind(problem: Any) -> str:  # Any: pydantic_core's ErrorDetails, whose keys depend on the kind
    if problem["type"] == "json_invalid":
        return f"no JSON ({problem['ctx']['error']})"
    return str(problem["type"])


def _bug(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return f"{type(error).__name__} in {frames[-1].filename}:{frames[-1].lineno}"


@lru_cache(maxsize=512)
def _schema_words(model: type[BaseModel]) -> frozenset[str]:
    """Every string in *model*'s schema: what a location may repeat, because it is code and not data."""
    words: set[str] = set()
    seen: set[int] = set()
    todo: list[object] = [model.__pydantic_core_schema__]
    while todo:
        part = todo.pop()
        if isinstance(part, str):
            words.add(part)
        elif isinstance(part, dict | list | tuple) and id(part) not in seen:
            seen.add(id(part))
            todo.extend(part)
            todo.extend(part.values() if isinstance(part, dict) else ())
    return frozenset(words)


def _culprit(event: BaseModel) -> str:
    """Where *event* does not serialise, and on what kind of value."""
    for name in type(event).model_fields:
        try:
            event.__pydantic_serializer__.to_json(event, include={name}, warnings="error")
        except Exception:  # noqa: BLE001  # as in to_json
            value = getattr(event, name, None)
            return _deepest(value, name) or f"{name}: {type(value).__name__}, which the field's type does not allow"
    return "a computed field or the model's own serialiser failed"


def _deepest(value: object, place: str) -> str | None:
    match value:
        case BaseModel():
            inner = [(getattr(value, name, None), f"{place}.{name}") for name in type(value).model_fields]
        case dict():
            inner = [(item, f"{place}.*") for item in value.values()]
        case list() | tuple() | set() | frozenset():
            inner = [(item, f"{place}.{index}") for index, item in enumerate(value)]
        case _:
            inner = []
    for item, where in inner:
        if found := _deepest(item, where):
            return found
    return None if _serialises(value) else f"{place}: {type(value).__name__}"


def _serialises(value: object) -> bool:
    try:
        any_to_json(value, bytes_mode="base64")
    except Exception:  # noqa: BLE001  # as in to_json
        return False
    return True


def _refuse_constants(model: type[BaseModel], data: bytes) -> None:
    def refuse(constant: str) -> NoReturn:
        raise EnvelopeError(f"{_title(model)} does not serialise: it holds {constant}, which JSON has no number for")

    json.loads(data, parse_constant=refuse)


# ── types and the catalogue ─────────────────────────────────────────────────────────────────────────


def is_name(text: str) -> bool:
    """Whether *text* could be an event's name: snake_case words joined by dots."""
    return _NAME.fullmatch(text) is not None


def split_type(type: str) -> tuple[str, int | None]:
    """`order_placed.v1` as `("order_placed", 1)`; a type without a version, as foreign ones are, with None."""
    if versioned := _TYPE.fullmatch(type):
        return versioned[1], int(versioned[2])
    return type, None


class Catalogue:
    """All events of a system, by type: what names are checked against.

    Raises:
        SetupError: two classes claim one type, or something is no event.
    """

    def __init__(self, *events: type[Event]) -> None:
        self._by_type: dict[str, type[Event]] = {}
        for event in events:
            self._add(event)

    def _add(self, event: type[Event]) -> None:
        if not (isinstance(event, type) and issubclass(event, Event) and hasattr(event, "event_type")):
            raise SetupError(f"Catalogue(): {event!r} is no event: give classes that derive from Event")
        other = self._by_type.setdefault(event.event_type, event)
        if other is not event:
            raise SetupError(
                f"{_where(other)} and {_where(event)} are both {event.event_type!r}: "
                "give one of them another name, or the next version"
            )
        if event.model_rebuild(raise_errors=False) is False:
            raise SetupError(f"{_where(event)} is not fully defined: import what its annotations name")
        _refuse_secrets(event)

    def find(self, type: str) -> type[Event] | None:
        """The event of this *type* (`order_placed.v1`); None if there is none."""
        return self._by_type.get(type)

    @property
    def types(self) -> tuple[str, ...]:
        """Every type, in the order given."""
        return tuple(self._by_type)

    @property
    def names(self) -> tuple[str, ...]:
        """Every name once, in the order given."""
        return tuple(dict.fromkeys(event.event_name for event in self))

    def versions(self, name: str) -> tuple[int, ...]:
        """The versions of *name*, ascending; empty if there is no such event."""
        return tuple(sorted(event.event_version for event in self if event.event_name == name))

    def suggest(self, name: str) -> str | None:
        """The name (for a type: the type) most like *name*, for a did-you-mean; None if nothing is."""
        known = self.types if split_type(name)[1] is not None else self.names
        return next(iter(difflib.get_close_matches(name, known, n=1)), None)

    def __iter__(self) -> Iterator[type[Event]]:
        return iter(self._by_type.values())

    def __len__(self) -> int:
        return len(self._by_type)
