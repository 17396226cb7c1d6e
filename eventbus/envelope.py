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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, NoReturn, Self, TypeVar

from pydantic import BaseModel
from pydantic_core import to_json as any_to_json

from eventbus.errors import EnvelopeError, SetupError
from eventbus.event import Event, from_json, to_json
from eventbus.message import Message

if TYPE_CHECKING:
    from cloudevents.core.v1.event import CloudEvent

M = TypeVar("M", bound=BaseModel)
E = TypeVar("E", bound="Envelope")
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
_NO_CHARACTERS = "".join(f"{chr(plane * 0x10000 + 0xFFFE)}{chr(plane * 0x10000 + 0xFFFF)}" for plane in range(17))
_FORBIDDEN = re.compile(f"[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef{_NO_CHARACTERS}]")
_URI_REFERENCE = re.compile(r"(?:[A-Za-z0-9\-._~:/?#\[\]@!$&'()*+,;=]|%[0-9A-Fa-f]{2})+")
_JSON_TYPE = re.compile(r"(?:(?:application|text)/json|[^/;\s]+/[^;\s]+\+json)\s*(?:;.*)?", re.IGNORECASE | re.DOTALL)
_RFC_3339 = re.compile(r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(?:\.\d+)?(?:[Zz]|[+-]\d\d:\d\d)", re.ASCII)
_CHARSET = re.compile(r";\s*charset\s*=\s*\"?([^\s;\"]+)", re.IGNORECASE)
_UTF_8 = frozenset({"utf-8", "utf8", "us-ascii", "ascii"})
_INT32 = range(-(2**31), 2**31)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_new = object.__new__
_NO_EXTENSIONS: Mapping[str, ExtensionValue] = MappingProxyType({})
# Looked up rather than cut off the prefix: these are in every message.
_USUAL_EXTENSIONS = frozenset({"traceparent", "tracestate", "correlationid", "causationid"})
_ATTRIBUTE = {
    PREFIX + name: name
    for name in ("specversion", "id", "source", "type", "time", "subject", "dataschema", *_USUAL_EXTENSIONS)
}


@dataclass(frozen=True, slots=True, kw_only=True, init=False)
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
    subject: str | None
    datacontenttype: str | None
    dataschema: str | None
    extensions: Mapping[str, ExtensionValue] = field(hash=False)
    data: bytes = field(repr=False)

    def __init__(
        self,
        *,
        id: str,
        source: str,
        type: str,
        time: datetime,
        subject: str | None = None,
        datacontenttype: str | None = JSON,
        dataschema: str | None = None,
        extensions: Mapping[str, ExtensionValue] = _NO_EXTENSIONS,
        data: bytes = b"",
    ) -> None:
        _fill(self, id, source, type, time, subject, datacontenttype, dataschema, extensions, data)

    def event(self, model: builtins.type[M]) -> M:
        """The data read as *model*.

        Raises:
            EnvelopeError: with the reason `invalid-data`: it is no JSON, or does not fit.
        """
        content_type = self.datacontenttype
        if not _is_json(content_type):
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
        # The SDK does not tell the JSON string "a" from the text a, nor null from nothing: bytes survive the way back.
        if isinstance(data, str | None) and _is_json(self.datacontenttype):
            data = self.data or None
        return CloudEvent(attributes, data)

    @classmethod
    def from_cloudevent(cls, event: CloudEvent) -> Self:
        """The SDK's *event* as an envelope.

        Raises:
            EnvelopeError: it breaks a rule of CloudEvents that the SDK does not check.
        """
        attributes = dict(event.get_attributes())
        _take_specversion(attributes)
        return _envelope(cls, attributes, _cloudevent_data(event))

    def __reduce__(self) -> tuple[object, ...]:
        # The read-only view of the extensions cannot be copied or pickled; the envelope can.
        values = {name: getattr(self, name) for name in self.__slots__}
        return _rebuilt, (type(self), values | {"extensions": dict(self.extensions)})


_set_id, _set_source, _set_type, _set_time, _set_subject = (
    Envelope.__dict__[name].__set__ for name in ("id", "source", "type", "time", "subject")
)
_set_datacontenttype, _set_dataschema, _set_extensions, _set_data = (
    Envelope.__dict__[name].__set__ for name in ("datacontenttype", "dataschema", "extensions", "data")
)


def _fill(
    envelope: Envelope,
    id: str,
    source: str,
    type: str,
    time: datetime,
    subject: str | None,
    datacontenttype: str | None,
    dataschema: str | None,
    extensions: Mapping[str, ExtensionValue],
    data: bytes,
) -> None:
    """Check every attribute, and set it: what a frozen dataclass does by itself, through the slots' own setters.

    A function, and its arguments by place: it runs twice for each event, and keywords cost as much as the checks.
    """
    # Printable text holds nothing forbidden, and asking is much cheaper than the search of `_check_text`.
    if not (isinstance(id, str) and id and id.isprintable()):
        _check_text("id", id)
    if not (isinstance(type, str) and type and type.isprintable()):
        _check_text("type", type)
    if not isinstance(source, str) or not _is_uri_reference(source):
        _check_uri_reference("source", source)
    if subject is not None:
        _check_text("subject", subject)
    if datacontenttype is not None and datacontenttype != JSON:
        _check_text("datacontenttype", datacontenttype)
    if dataschema is not None:
        _check_uri_reference("dataschema", dataschema)
    if not isinstance(data, bytes):
        _refuse("data", f"is {_kind(data)}: give bytes")
    _set_id(envelope, id)
    _set_source(envelope, source)
    _set_type(envelope, type)
    _set_time(envelope, _in_utc(time))
    _set_subject(envelope, subject)
    _set_datacontenttype(envelope, datacontenttype)
    _set_dataschema(envelope, dataschema)
    _set_extensions(envelope, extensions if extensions is _NO_EXTENSIONS else _checked_extensions(extensions))
    _set_data(envelope, data)


def _cloudevent_data(event: CloudEvent) -> bytes:
    from cloudevents.core.formats.json import JSONFormat

    data: object = event.get_data()
    content_type = event.get_datacontenttype()
    if isinstance(data, str | bytes | bytearray | None) or not _is_json(content_type):
        return JSONFormat().write_data(data, content_type)  # type: ignore[arg-type]  # it takes what it gave
    try:
        return json.dumps(data, default=_canonical_time, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        # Not chained: the cause may quote the data.
        raise EnvelopeError(f"the data does not serialise as JSON ({type(error).__name__})") from None


def _canonical_time(value: object) -> str:
    if isinstance(value, datetime):
        return value.isoformat()
    raise TypeError


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
    envelope = _new(Envelope)
    _fill(
        envelope, id, source, event.event_type, time, subject, JSON, None, extensions or _NO_EXTENSIONS, to_json(event)
    )
    return envelope


def enclose_anew(event: Event, *, id: str, source: str, time: datetime) -> Envelope:
    """As `enclose`, for an *id* and a *time* in UTC that the bus has made, and a *source* that was checked.

    Nothing is checked again, an event's type neither: its class was.

    Raises:
        EnvelopeError: the event does not serialise.
    """
    envelope = _new(Envelope)
    _set_data(envelope, to_json(event))
    _set_id(envelope, id)
    _set_source(envelope, source)
    _set_type(envelope, event.event_type)
    _set_time(envelope, time)
    _set_subject(envelope, None)
    _set_datacontenttype(envelope, JSON)
    _set_dataschema(envelope, None)
    _set_extensions(envelope, _NO_EXTENSIONS)
    return envelope


def check_source(source: str) -> None:
    """Raises:
    SetupError: *source* can be no event's source.
    """
    try:
        _check_uri_reference("source", source)
    except EnvelopeError as error:
        raise SetupError(f"source={source!r} cannot be: {error}") from error


# ── out ─────────────────────────────────────────────────────────────────────────────────────────────


def encode(envelope: Envelope) -> Message:
    """*envelope* in binary mode.

    Raises:
        EnvelopeError: as `headers_of` says.
    """
    return Message(headers_of(envelope), envelope.data, envelope.datacontenttype)


def headers_of(envelope: Envelope) -> dict[str, object]:
    """What *envelope* says about its data, as the headers of a message in binary mode.

    Raises:
        EnvelopeError: its data are a whole CloudEvent: with that content type it would be read as structured mode.
    """
    if envelope.datacontenttype != JSON and _is_structured(envelope.datacontenttype):
        raise EnvelopeError(
            f"data of the type {envelope.datacontenttype!r} cannot be published, they would be taken for the event "
            "itself: publish the event inside, or call its data application/json"
        )
    headers: dict[str, object] = {
        # First what is the same for all events of a type: who reads many compares it at once instead of reading it.
        "cloudEvents_specversion": SPECVERSION,
        "cloudEvents_source": envelope.source,
        "cloudEvents_type": envelope.type,
    }
    if envelope.dataschema is not None:
        headers["cloudEvents_dataschema"] = envelope.dataschema
    headers["cloudEvents_id"] = envelope.id
    headers["cloudEvents_time"] = _rfc_3339(envelope.time)
    if envelope.subject is not None:
        headers["cloudEvents_subject"] = envelope.subject
    for name, value in envelope.extensions.items():
        headers[PREFIX + name] = value
    return headers


def _rfc_3339(time: datetime) -> str:
    return any_to_json(time).decode()[1:-1]  # half of isoformat's time; UTC is written as Z


# ── in ──────────────────────────────────────────────────────────────────────────────────────────────


def decode(message: Message, *, now: Callable[[], datetime]) -> Envelope:
    """The envelope in *message*, whoever wrote it.

    *now* is asked for its time where the sender gave none (CloudEvents lets it) and no AMQP timestamp either.

    Raises:
        EnvelopeError: it is no CloudEvent; its reason is `invalid-envelope`.
    """
    if (plain := _plain(message)) is not None:
        return plain
    content_type = message.content_type or None
    if content_type is not None and content_type != JSON and _is_structured(content_type):
        attributes, data = _structured(content_type, message.body)
    else:
        attributes, data = _binary(message.headers), message.body
        if content_type is not None:
            attributes["datacontenttype"] = content_type
    _take_specversion(attributes)
    if attributes.get("time") is None:
        timestamp = message.properties.get("timestamp")
        attributes["time"] = timestamp if isinstance(timestamp, datetime) else now()
    return _envelope(Envelope, attributes, data)


def _plain(message: Message) -> Envelope | None:
    """The envelope of JSON with what every event says about itself, and nothing else; None for any other message.

    Most that have no cause and no trace are like this, and to read them like all others takes half as long again.
    """
    headers = message.headers
    if len(headers) != _PLAIN_HEADERS or message.content_type != JSON:
        return None
    try:
        specversion, source = headers["cloudEvents_specversion"], headers["cloudEvents_source"]
        type_, id_, time = headers["cloudEvents_type"], headers["cloudEvents_id"], headers["cloudEvents_time"]
    except KeyError:
        return None
    if specversion != SPECVERSION or time is None:
        return None
    envelope = _new(Envelope)
    _fill(envelope, id_, source, type_, _read_time(time), None, JSON, None, _NO_EXTENSIONS, message.body)  # type: ignore[arg-type]  # it checks
    return envelope


_PLAIN_HEADERS: Final = 5  # that `_plain` reads


def _binary(headers: Mapping[str, object]) -> dict[str, Any]:
    attributes: dict[str, Any] = {}
    others: dict[str, object] = {}
    attribute_of = _ATTRIBUTE.get
    for header, value in headers.items():
        if (name := attribute_of(header)) is not None:
            attributes[name] = value
        elif header.startswith(PREFIX):
            attributes[header[len(PREFIX) :]] = value
        elif header[:2] in _PREFIX_STARTS:
            others[header] = value
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


def _is_structured(content_type: str | None) -> bool:
    return content_type is not None and content_type[: len(_STRUCTURED)].lower() == _STRUCTURED


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
    attributes = {name: value for name, (value, _) in members.items()}
    content_type = attributes.get("datacontenttype")
    encoded = attributes.pop("data_base64", None)
    value = attributes.pop("data", None)
    if encoded is not None and value is not None:
        _refuse("data", "is there twice, as data and as data_base64: the sender must write one")
    if encoded is not None:
        return attributes, _from_base64(encoded)
    if "data" not in members:
        return attributes, b""
    if isinstance(value, str) and isinstance(content_type, str) and not _is_json(content_type):
        return attributes, _text(value)
    return attributes, members["data"][1].encode()


def _text(value: str) -> bytes:
    try:
        return value.encode()
    except UnicodeEncodeError:  # "\ud800" in JSON is a lone surrogate; not chained, for it carries the text
        raise EnvelopeError("the event's data hold a lone surrogate: the sender must write Unicode") from None


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


def _take_specversion(attributes: dict[str, Any]) -> None:
    version = attributes.pop("specversion", None)
    if version == SPECVERSION:
        return
    if version is None and not attributes.keys() & {"id", "source", "type"}:
        raise EnvelopeError(
            "no CloudEvents attributes: neither binary headers (cloudEvents_id, ...) nor structured mode "
            "(content type application/cloudevents+json): the sender must publish CloudEvents 1.0"
        )
    if version is None:
        _refuse("specversion", f"is missing: the sender must give {SPECVERSION!r}")
    said = repr(version[:20]) if isinstance(version, str) else _kind(version)
    _refuse("specversion", f"is {said}: only {SPECVERSION!r} is read")


def _envelope(cls: type[E], attributes: dict[str, Any], data: bytes) -> E:
    """The envelope of CloudEvents *attributes*; what has no field of its own is an extension."""
    take, envelope = attributes.pop, _new(cls)
    _fill(
        envelope,
        take("id", None),
        take("source", None),
        take("type", None),
        _read_time(take("time", None)),
        take("subject", None),
        take("datacontenttype", None),
        take("dataschema", None),
        # Evaluated last, when only the extensions are left.
        _canonical_extensions(attributes) if attributes else _NO_EXTENSIONS,
        data,
    )
    return envelope


def _canonical_extensions(attributes: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in attributes.items():
        if type(value) is str:
            found[name] = value
        elif value is not None:
            found[name] = _canonical(value)
    return found


def _canonical(value: object) -> object:
    """Types that CloudEvents has and an envelope has not, as their canonical strings (CloudEvents section 3.1)."""
    if isinstance(value, datetime):
        return _rfc_3339(_in_utc(value))
    if isinstance(value, bytearray):  # AMQP's byte array; bytes would be a string that is not UTF-8
        return base64.b64encode(value).decode()
    return value


def _check_text(attribute: str, value: object) -> None:
    if isinstance(value, str) and value and value.isprintable():
        return
    if value is None:
        _refuse(attribute, "is missing: the sender must give it")
    if isinstance(value, bytes):
        _refuse(attribute, "is not UTF-8: the sender must write it as a UTF-8 string")
    if not isinstance(value, str):
        _refuse(attribute, f"is {_kind(value)}: give a string")
    if not value:
        _refuse(attribute, "is empty: give a value, or leave an optional one out")
    if _FORBIDDEN.search(value):
        _refuse(attribute, "holds a control character or what is no character at all: leave it out")


def _check_uri_reference(attribute: str, value: object) -> None:
    if not isinstance(value, str) or not _is_uri_reference(value):
        _check_text(attribute, value)
        _refuse(attribute, "is no URI reference: give one like '/services/orders' (other characters as %XX)")


@lru_cache(maxsize=1024)  # a system has few sources, and each is seen with every event
def _is_uri_reference(value: str) -> bool:
    return bool(_URI_REFERENCE.fullmatch(value)) and value.count("#") <= 1


@lru_cache(maxsize=256)
def _is_json(content_type: str | None) -> bool:
    return content_type is None or bool(_JSON_TYPE.fullmatch(content_type))


def _checked_extensions(extensions: Mapping[str, ExtensionValue]) -> Mapping[str, ExtensionValue]:
    for name, value in extensions.items():
        if name not in _USUAL_EXTENSIONS or not isinstance(value, str) or not value.isprintable():
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
    elif value != "":  # the one text that may be empty
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
            return datetime.fromisoformat(value if value[-1] == "Z" else value.upper())
        if isinstance(value, int) and not isinstance(value, bool):
            return _EPOCH + timedelta(milliseconds=value)
    except (ValueError, OverflowError):
        pass
    if isinstance(value, datetime):
        return value if value.tzinfo is not None else value.replace(tzinfo=UTC)  # AMQP's are UTC
    _refuse("time", "is no time: the sender must write it as RFC 3339 has it, like '2030-01-31T12:00:00Z'")
