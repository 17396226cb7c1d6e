"""An event as JSON, or an error where one of its values is not of its field's type.

pydantic only warns of such a value. Asked for an error (`warnings="error"`) it tries to read the word as a bool first,
and makes an exception of that: 0.75 µs, as long as an order of three lines takes to be written (pydantic 2.14).
`warnings=True` is read at once. So it warns here, and Python refuses the warning: before it asks any filter, it looks
up `__warningregistry__` in the module whose code runs, and raises TypeError where that is neither a dict nor None.
"""

from __future__ import annotations

import warnings
from typing import Final, Literal

from pydantic import BaseModel
from pydantic_core import SchemaSerializer, core_schema

__warningregistry__: Final = ()  # empty, or unittest's assertWarns would put a dict in its place


def to_json(event: BaseModel) -> bytes:
    """*event* as JSON, in one pass.

    Raises:
        Exception: it does not serialise; or it does, and its own serialiser warned whoever called it of something.
    """
    return event.__pydantic_serializer__.to_json(event, warnings=_WARNINGS)


def _are_warnings_refused() -> bool:
    """Whether this Python and this pydantic do as is said above."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            SchemaSerializer(core_schema.int_schema()).to_json("no number", warnings=True)
        except TypeError:
            return True
    return False


_WARNINGS: Final[bool | Literal["error"]] = True if _are_warnings_refused() else "error"
