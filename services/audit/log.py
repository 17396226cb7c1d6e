"""An append-only file of JSON lines, one for each event that was heard.

A line is written whole and reaches the disk before the event is acknowledged. The log relies on the bus alone to
recognise duplicates: what was handled twice stands there twice, and a reader can tell by source and id.
"""

import asyncio
import base64
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from eventbus import Envelope
from services.settings import Settings


class AuditLog:
    """The open file; any number of processes may append to it."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    async def append(self, envelope: Envelope) -> None:
        await asyncio.to_thread(self._write, line(envelope))

    def _write(self, text: bytes) -> None:
        # One call: the lines of several writers never mix.
        if os.write(self._descriptor, text) < len(text):
            raise OSError("the disk took part of a line only")
        os.fsync(self._descriptor)


def line(envelope: Envelope) -> bytes:
    """The event as a structured CloudEvent without spaces: JSON data as it is, anything else as base64."""
    attributes = {
        "specversion": "1.0",
        "id": envelope.id,
        "source": envelope.source,
        "type": envelope.type,
        "time": envelope.time.isoformat(),
        "subject": envelope.subject,
        "datacontenttype": envelope.datacontenttype,
        "dataschema": envelope.dataschema,
        **envelope.extensions,
        **_data(envelope),
    }
    known = {name: value for name, value in attributes.items() if value is not None}
    return json.dumps(known, separators=(",", ":")).encode() + b"\n"


def _data(envelope: Envelope) -> dict[str, object]:
    if (envelope.datacontenttype or "application/json") == "application/json":
        with suppress(ValueError, RecursionError):  # it says JSON and is none: kept byte by byte, like all else
            data = json.loads(envelope.data)
            json.dumps(data, allow_nan=False)
            return {"data": data}
    return {"data_base64": base64.b64encode(envelope.data).decode()}


@asynccontextmanager
async def resources(settings: Settings) -> AsyncIterator[AuditLog]:
    """Open `audit.jsonl`; a line that a crash cut short is ended, so that the next one stands alone."""
    settings.data.mkdir(parents=True, exist_ok=True)
    file = settings.data / "audit.jsonl"
    descriptor = os.open(file, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            os.write(descriptor, b"\n")
        yield AuditLog(descriptor)
    finally:
        os.close(descriptor)
