"""CloudEvents 1.0, in and out of a `Message`.

The one rule: an `Envelope` that exists is a valid CloudEvent. What arrives is checked here, once; what nobody could
read is an `EnvelopeError` that names the attribute and the remedy, never the data.

Written is binary mode, with the header prefix that makes RabbitMQ hand it to AMQP 1.0 readers as the CloudEvents AMQP
binding wants it. Read are binary mode with every prefix in use, and structured mode. Sources: CloudEvents 1.0.2
section 3, its JSON format and its AMQP binding; the RabbitMQ binding of knative for `ce-`.
"""

from __future__ import annotations

import base64
import builtins
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NoReturn, Self, TypeVar

from pydantic import BaseModel

from eventbus.errors import EnvelopeError
from eventbus.event import Event, from_json, to_json
from eventbus.message import Message

if TYPE_CHECKING:
    from cloudevents.core.v1.event import CloudEvent

M = TypeVar("M", bound=BaseModel)
ExtensionValue = str | int | bool

SPECVERSION = "1.0"
JSON = "application/json"
PREFIX = "cloudEvents_"

_STRUCTURED = "application/cloudevents"
_PREFIXED = re.compile(r"(cloudevents[_:]|ce[-_])(.+)", re.IGNORECASE | re.DOTALL)
_PREFIX_STARTS = frozenset({"cl", "cL", "Cl", "CL", "ce", "cE", "Ce", "CE"})
_RESERVED = frozenset(
    {"id", "source", "type", "specversion", "time", "subject", "datacontenttype", "dataschema", "data"}
)
_EXTENSION_NAME = re.compile(r"[a-z0-9]+")
# What a CloudEvents string may not hold: control characters, lone surrogates, Unicode's non-characters.
_FORBIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")
_URI_REFERENCE = re.compile(r"(?:[A-Za-z0-9\-._~:/?#\[\]@!$&'()*+,;=]|%[0-9A-Fa-f]{2})+")
_JSON_TYPE = re.compile(r"(?:(?:application|text)/json|[^/;\s]+/[^;\s]+\+json)\s*(?:;.*)?", re.IGNORECASE | re.DOTALL)
_RFC_3339 = re.compile(r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(?:\.\d+)?(?:[Zz]|[+-]\d\d:\d\d)", re.ASCII)
_CHARSET = re.compile(r";\s*charset\s*=\s*\"?([^\s;\"]+)", re.IGNORECASE)
_UTF_8 = frozenset({"utf-8", "utf8", "us-ascii", "ascii"})
_INT32 = range(-(2**31), 2**31)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True, kw_only=True)
class Envelope:
    """An event's data and what CloudEvents says about it.

    *time* is kept in UTC; *data* are the bytes as they travel. No *datacontenttype* means JSON.

    Raises:
        EnvelopeError: an attribute breaks a rule of CloudEvents.
    """

    id: str
    source: str
    type: str
    time: datetime
    subject: str | None = None
    datacontenttype: str | None = JSON
    dataschema: str | None = None
    extensions: Mapping[str, ExtensionValue] = field(default_factory=dict, hash=False)
    data: bytes = field(default=b"", repr=False)

    def __post_init__(self) -> None:
        _check_text("id", self.id)
        _check_text("type", self.type)
        _check_text("source", self.source)
        _check_uri_reference("source", self.source)
        if self.subject is not None:
            _check_text("subject", self.subject)
        if self.datacontenttype is not None:
            _check_text("datacontenttype", self.datacontenttype)
        if self.dataschema is not None:
            _check_text("dataschema", self.dataschema)
            _check_uri_reference("dataschema", self.dataschema)
        if not isinstance(self.data, bytes):
            _refuse("data", f"is {_kind(self.data)}, not bytes")
        object.__setattr__(self, "time", _in_utc(self.time))
        object.__setattr__(self, "extensions", _checked_extensions(self.extensions))

    def event(self, model: builtins.type[M]) -> M:
        """The data read as *model*.

        Raises:
            EnvelopeError: with the reason `invalid-data`: it is no JSON, or does not fit.
        """
        content_type = self.datacontenttype
        if content_type is not None and content_type != JSON and not _JSON_TYPE.fullmatch(content_type):
            raise EnvelopeError(
                f"{self.type}: the data are {content_type!r}, and only JSON can be read as {model.__name__}: "
                "annotate the handler with Envelope to get the bytes",
                reason="invalid-data",
            )
        return from_json(model, self.data)

    def to_cloudevent(self) -> CloudEvent:
        """This event as the `cloudevents` SDK has it: JSON data parsed, text as str, anything else as bytes."""
        from cloudevents.core.formats.json import JSONFormat
        from cloudevents.core.v1.event import CloudEvent

        attributes: dict[str, object] = {
            "specversion": SPECVERSION,
            "id": self.id,
            "source": self.source,
            "type": self.type,
            "time": self.time,
        }
        for name in ("subject", "datacontenttype", "dataschema"):
            if (value := getattr(self, name)) is not None:
                attributes[name] = value
        attributes.update(self.extensions)
        data = JSONFormat().read_data(self.data, self.datacontenttype)
        # The SDK does not tell the JSON string "a" from the text a: bytes survive the way back.
        if isinstance(data, str) and _is_json(self.datacontenttype):
            data = self.data
        return CloudEvent(attributes, data)

    @classmethod
    def from_cloudevent(cls, event: CloudEvent) -> Self:
        """The SDK's *event* as an envelope.

        Raises:
            EnvelopeError: it breaks a rule of CloudEvents that the SDK does not check.
        """
        attributes = dict(event.get_attributes())
        data = event.get_data()
        if not isinstance(data, str | bytes | bytearray | None) and _is_json(event.get_datacontenttype()):
            body = json.dumps(data, default=_json_default).encode()
        else:
            from cloudevents.core.formats.json import JSONFormat

            body = JSONFormat().write_data(data, event.get_datacontenttype())
        return cls(**_constructor_arguments(attributes), data=body)

    def __reduce__(self) -> tuple[object, ...]:
        # The read-only view of the extensions cannot be copied or pickled; the envelope can.
        values = {name: getattr(self, name) for name in self.__slots__}
        return _rebuilt, (type(self), values | {"extensions": dict(self.extensions)})


def _rebuilt(cls: type[Envelope], values: dict[str, Any]) -> Envelope:
    return cls(**values)


def enclose(
    event: Event,
    *,
    id: str,
    source: str,
    time: datetime,
    subject: str | None = None,
    extensions: Mapping[str, ExtensionValue] | None = None,
) -> Envelope:
    """The envelope of *event*.

    Raises:
        EnvelopeError: the event does not serialise, or an attribute breaks a rule of CloudEvents.
    """
    return Envelope(
        id=id,
        source=source,
        type=event.event_type,
        time=time,
        subject=subject,
        extensions=extensions or {},
        data=to_json(event),
    )


# ── out ─────────────────────────────────────────────────────────────────────────────────────────────


def encode(envelope: Envelope) -> Message:
    """*envelope* in binary mode."""
    headers: dict[str, object] = {
        "cloudEvents_specversion": SPECVERSION,
        "cloudEvents_id": envelope.id,
        "cloudEvents_source": envelope.source,
        "cloudEvents_type": envelope.type,
        "cloudEvents_time": _rfc_3339(envelope.time),
    }
    if envelope.subject is not None:
        headers["cloudEvents_subject"] = envelope.subject
    if envelope.dataschema is not None:
        headers["cloudEvents_dataschema"] = envelope.dataschema
    for name, value in envelope.extensions.items():
        headers[PREFIX + name] = value
    return Message(headers, envelope.data, envelope.datacontenttype)


def _rfc_3339(time: datetime) -> str:
    return time.isoformat()[:-6] + "Z"  # always UTC, so always +00:00


# ── in ──────────────────────────────────────────────────────────────────────────────────────────────


def decode(message: Message, *, received: datetime) -> Envelope:
    """The envelope in *message*, whoever wrote it.

    *received* is its time where the sender gave none (CloudEvents lets it) and no AMQP timestamp either.

    Raises:
        EnvelopeError: it is no CloudEvent; its reason is `invalid-envelope`.
    """
    content_type = message.content_type or None
    if content_type is not None and content_type[: len(_STRUCTURED)].lower() == _STRUCTURED:
        attributes, data = _structured(content_type, message.body)
    else:
        attributes, data = _binary(message.headers), message.body
        if content_type is not None:
            attributes["datacontenttype"] = content_type
        if not attributes.keys() & {"id", "source", "type", "specversion"}:
            raise EnvelopeError(
                "no CloudEvents attributes: neither binary headers (cloudEvents_id, ...) nor structured mode "
                "(content type application/cloudevents+json): the sender must publish CloudEvents 1.0"
            )
    _check_specversion(attributes)
    if attributes.get("time") is None:
        attributes["time"] = message.properties.get("timestamp") or received
    return Envelope(**_constructor_arguments(attributes), data=data)


def _binary(headers: Mapping[str, object]) -> dict[str, Any]:
    attributes: dict[str, Any] = {}
    others: dict[str, object] = {}
    for name, value in headers.items():
        if name.startswith(PREFIX):
            attributes[name[12:]] = value
        elif name[:2] in _PREFIX_STARTS:
            others[name] = value
    return _foreign(attributes, others) if others else attributes


def _foreign(attributes: dict[str, Any], others: Mapping[str, object]) -> dict[str, Any]:
    """Attributes under the other prefixes, in any case: HTTP bridges write `Ce-Id`."""
    prefixes = {PREFIX.lower()} if attributes else set()
    for header, value in others.items():
        if prefixed := _PREFIXED.fullmatch(header):
            prefixes.add(prefixed[1].lower())
            attributes[prefixed[2].lower()] = value
    if len(prefixes) > 1:
        raise EnvelopeError(
            f"the headers mix the prefixes {', '.join(sorted(prefixes))}: "
            "the sender must write one of them (the AMQP binding allows one per message)"
        )
    return attributes


def _structured(content_type: str, body: bytes) -> tuple[dict[str, Any], bytes]:
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type != f"{_STRUCTURED}+json":
        raise EnvelopeError(
            f"the content type {media_type!r} cannot be read: "
            f"the sender must publish one event per message, as {_STRUCTURED}+json or in binary mode"
        )
    charset = _CHARSET.search(content_type)
    if charset and charset[1].lower() not in _UTF_8:
        raise EnvelopeError(f"the structured event is in {charset[1]!r}: the sender must write UTF-8")
    try:
        members = _members(body.decode())
    except UnicodeDecodeError:
        raise EnvelopeError("the structured event is not UTF-8: the sender must write UTF-8") from None
    except (ValueError, RecursionError):
        # Not chained: the decoder's error carries the document.
        raise EnvelopeError("the structured event is no JSON object: the sender must write one") from None
    return _attributes_and_data(members)


def _attributes_and_data(members: dict[str, tuple[object, str]]) -> tuple[dict[str, Any], bytes]:
    """JSON format sections 2.2 and 3.1: null is unset; data is JSON, or text of another type, or base64."""
    attributes = {name: value for name, (value, _) in members.items() if value is not None}
    content_type = attributes.get("datacontenttype")
    encoded = attributes.pop("data_base64", None)
    if "data" in members and encoded is not None:
        _refuse("data", "is there twice, as data and as data_base64: the sender must write one")
    if encoded is not None:
        return attributes, _from_base64(encoded)
    if "data" not in members:
        return attributes, b""
    value, text = members["data"]
    attributes.pop("data", None)
    if isinstance(value, str) and isinstance(content_type, str) and not _is_json(content_type):
        return attributes, value.encode(errors="surrogatepass")
    return attributes, text.encode()


def _from_base64(encoded: object) -> bytes:
    if not isinstance(encoded, str):
        _refuse("data_base64", f"is {_kind(encoded)}: the sender must write a string")
    try:
        return base64.b64decode(encoded, validate=True)
    except ValueError:
        _refuse("data_base64", "is not base64: the sender must encode it as RFC 4648 has it")


_WHITESPACE = re.compile(r"[ \t\n\r]*")


def _not_json(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_not_json)


def _members(text: str) -> dict[str, tuple[object, str]]:
    """The members of the JSON object *text*, each with its value and with the text of it.

    The data keep their text: to parse 12345678901234567.89 and write it again would change it.
    """
    members: dict[str, tuple[object, str]] = {}
    at = _past(text, 0, "{")
    if text.startswith("}", at):
        at += 1
    else:
        while True:
            name, end = _DECODER.raw_decode(text, at)
            if not isinstance(name, str):
                raise ValueError("a member has no name")
            begin = _past(text, end, ":")
            value, end = _DECODER.raw_decode(text, begin)
            members[name] = value, text[begin:end]
            at = _skip_whitespace(text, end)
            if text.startswith("}", at):
                at += 1
                break
            at = _past(text, at, ",")
    if _skip_whitespace(text, at) != len(text):
        raise ValueError("more than one document")
    return members


def _past(text: str, at: int, mark: str) -> int:
    at = _skip_whitespace(text, at)
    if not text.startswith(mark, at):
        raise ValueError(f"{mark} expected")
    return _skip_whitespace(text, at + 1)


def _skip_whitespace(text: str, at: int) -> int:
    match = _WHITESPACE.match(text, at)
    assert match is not None
    return match.end()


# ── the rules ───────────────────────────────────────────────────────────────────────────────────────


def _refuse(attribute: str, why: str) -> NoReturn:
    raise EnvelopeError(f"the CloudEvents attribute {attribute!r} {why}")


def _kind(value: object) -> str:
    return f"a value of type {type(value).__name__}"


def _check_specversion(attributes: dict[str, Any]) -> None:
    version = attributes.pop("specversion", None)
    if version == SPECVERSION and isinstance(version, str):
        return
    if version is None:
        _refuse("specversion", f"is missing: the sender must give {SPECVERSION!r}")
    said = repr(version[:20]) if isinstance(version, str) else _kind(version)
    _refuse("specversion", f"is {said}: only {SPECVERSION!r} is read")


def _constructor_arguments(attributes: dict[str, Any]) -> dict[str, Any]:
    """CloudEvents attributes sorted into the constructor's parameters; what has no parameter is an extension."""
    arguments: dict[str, Any] = {}
    attributes.pop("specversion", None)
    for name in ("id", "source", "type"):
        value = attributes.pop(name, None)
        if value is None:
            _refuse(name, "is missing: the sender must give it")
        arguments[name] = value
    arguments["time"] = _read_time(attributes.pop("time", None))
    for name in ("subject", "datacontenttype", "dataschema"):
        arguments[name] = attributes.pop(name, None)
    arguments["extensions"] = (
        {name: _canonical(name, value) for name, value in attributes.items() if value is not None}
        if attributes
        else attributes
    )
    return arguments


def _canonical(name: str, value: object) -> object:
    """Types that CloudEvents has and an envelope has not, as their canonical strings (CloudEvents section 3.1)."""
    if isinstance(value, datetime):
        return _rfc_3339(_in_utc(value))
    if isinstance(value, bytearray):  # AMQP's byte array; bytes would be a string that is not UTF-8
        return base64.b64encode(value).decode()
    return value


def _check_text(attribute: str, value: object) -> None:
    if not isinstance(value, str):
        if isinstance(value, bytes):
            _refuse(attribute, "is not UTF-8: the sender must write it as a UTF-8 string")
        _refuse(attribute, f"is {_kind(value)}: give a string")
    if not value:
        _refuse(attribute, "is empty: give a value, or leave an optional one out")
    # Printable text has no forbidden character, and asking is much cheaper than the search.
    if not value.isprintable() and (_FORBIDDEN.search(value) or _has_noncharacter(value)):
        _refuse(attribute, "holds a control character or what is no character at all: leave it out")


def _has_noncharacter(value: str) -> bool:
    return any(ord(character) & 0xFFFE == 0xFFFE for character in value)


def _check_uri_reference(attribute: str, value: str) -> None:
    if not _is_uri_reference(value):
        _refuse(attribute, "is no URI reference: give one like '/services/orders' (other characters as %XX)")


@lru_cache(maxsize=1024)  # a system has few sources, and each is seen with every event
def _is_uri_reference(value: str) -> bool:
    return bool(_URI_REFERENCE.fullmatch(value)) and value.count("#") <= 1


@lru_cache(maxsize=256)
def _is_json(content_type: str | None) -> bool:
    return content_type is None or bool(_JSON_TYPE.fullmatch(content_type))


_NO_EXTENSIONS: Mapping[str, ExtensionValue] = MappingProxyType({})


def _checked_extensions(extensions: Mapping[str, ExtensionValue]) -> Mapping[str, ExtensionValue]:
    if not extensions:
        return _NO_EXTENSIONS
    for name, value in extensions.items():
        _check_extension(name, value)
    return MappingProxyType(dict(extensions))


def _check_extension(name: object, value: object) -> None:
    if not isinstance(name, str) or not _EXTENSION_NAME.fullmatch(name):
        raise EnvelopeError(f"{name!r} is no name for a CloudEvents extension: give lower-case letters and digits")
    if name in _RESERVED:
        raise EnvelopeError(f"the CloudEvents extension {name!r} has the name of an attribute: give another name")
    if isinstance(value, int):
        if value not in _INT32:
            _refuse(name, "is a number over 32 bits: give it as a string")
    elif value != "" or not isinstance(value, str):
        _check_text(name, value)


def _in_utc(time: object) -> datetime:
    if not isinstance(time, datetime):
        _refuse("time", f"is {_kind(time)}: give a datetime")
    if time.tzinfo is UTC:
        return time
    if time.utcoffset() is None:
        _refuse("time", "has no time zone: give an aware datetime, like datetime.now(UTC)")
    try:
        return time.astimezone(UTC)
    except OverflowError:
        _refuse("time", "lies outside the years 1 to 9999")


def _read_time(value: object) -> datetime:
    """A time as senders write it: RFC 3339, an AMQP timestamp, or milliseconds since 1970 (the SDK writes those)."""
    try:
        if isinstance(value, str) and _RFC_3339.fullmatch(value):
            return datetime.fromisoformat(value.upper())
        if isinstance(value, int) and not isinstance(value, bool):
            return _EPOCH + timedelta(milliseconds=value)
    except (ValueError, OverflowError):
        pass
    if isinstance(value, datetime):
        return value if value.tzinfo is not None else value.replace(tzinfo=UTC)  # AMQP's are UTC
    _refuse("time", "is no time: the sender must write it as RFC 3339 has it, like '2030-01-31T12:00:00Z'")


def _json_default(value: object) -> str:
    if isinstance(value, datetime):
        return value.isoformat()
    raise TypeError(f"{type(value).__name__} does not serialise")
