"""Messages as other programs put them on the wire, one file each; `README.md` says where each form is written down."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from tests.faults.hostile.amqp import Field, Raw, encode_properties

FOLDER = Path(__file__).parent


def load() -> dict[str, Raw]:
    """The corpus by name."""
    return {file.stem: _read(json.loads(file.read_text())) for file in sorted(FOLDER.glob("*.json"))}


def _read(told: dict[str, Any]) -> Raw:
    values: dict[str, Any] = {
        name: value.encode() if isinstance(value, str) else value for name, value in told.get("properties", {}).items()
    }
    if "headers" in told:
        values["headers"] = [(name.encode(), field_of(value)) for name, value in told["headers"].items()]
    body = told["body"]
    match body:
        case {"base64": text}:
            content = base64.b64decode(text)
        case str():
            content = body.encode()
        case _:
            content = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
    return Raw(told["key"].encode(), encode_properties(values), content)


def field_of(value: Any) -> Field:
    """JSON as a field; {"$T": 5} is a field of type T, for what JSON has no word for."""
    match value:
        case bool():
            return "t", value
        case int():
            return ("I" if -(2**31) <= value < 2**31 else "l"), value
        case float():
            return "d", value
        case str():
            return "S", value.encode()
        case None:
            return "V", None
        case list():
            return "A", [field_of(one) for one in value]
        case {"$x": text}:
            return "x", base64.b64decode(text)
        case dict() if len(value) == 1 and (name := next(iter(value))).startswith("$"):
            return name[1:], tuple(value[name]) if name == "$D" else value[name]
        case _:
            return "F", [(name.encode(), field_of(one)) for name, one in value.items()]
