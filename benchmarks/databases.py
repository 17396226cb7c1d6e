"""Where the bench gets its databases: as the tests do (`tests.stores`), but as safe as their makers ship them.

The tests' PostgreSQL does not wait for its disk, and their Redis waits for every command: neither is what it costs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from tests.stores import KINDS, POSTGRESQL, REDIS, Engine, Given, Kind, Native, StoreServer, apart, make_tables
from tests.stores import new_engine as new_engine_of_tests

_AS_SHIPPED = {
    "postgresql": replace(
        POSTGRESQL,
        command=lambda program, folder, port: [
            *(str(program), "-D", str(folder / "data"), "-p", str(port), "-c", "listen_addresses=127.0.0.1"),
            *("-c", "unix_socket_directories="),
        ],
        arguments="",
    ),
    # Redis keeps nothing by itself; with `appendonly yes` it asks the disk every second.
    "redis": replace(
        REDIS,
        command=lambda program, folder, port: [
            *(str(program), "--bind", "127.0.0.1", "--port", str(port), "--dir", str(folder)),
            *("--save", "", "--appendonly", "yes"),
        ],
        arguments="--protected-mode no --save '' --appendonly yes",
    ),
}
SERVERS = tuple(KINDS)  # SQLite needs none


class Databases:
    """A PostgreSQL and a Redis, started when first asked for, and files for SQLite; ended together."""

    def __init__(self) -> None:
        self._servers: dict[str, StoreServer] = {}
        self._folder = tempfile.TemporaryDirectory(prefix="eventbus-bench-")
        self._files = 0

    def start(self, name: str) -> str:
        """Have the server *name* run; says which it is.

        Raises:
            NoStore: there is none. ServerError: it does not start.
        """
        if name not in self._servers:
            kind = _AS_SHIPPED[name]
            server = StoreServer(kind, _new_engine(kind))
            server.start()
            self._servers[name] = server
        return self._servers[name].origin

    @contextmanager
    def new(self, name: str) -> Iterator[str]:
        """The URL of an empty database of *name*, `sqlite` too, with the bus's tables; gone when the block is left."""
        if name == "sqlite":
            self._files += 1
            file = Path(self._folder.name) / f"{self._files}.db"
            url = f"sqlite:///{file}"
            apart(make_tables(url))
            yield url
            for part in file.parent.glob(f"{file.name}*"):
                part.unlink()
            return
        self.start(name)
        url = self._servers[name].new_url()
        try:
            apart(make_tables(url))
            yield url
        finally:
            self._servers[name].drop()

    def close(self) -> None:
        for server in self._servers.values():
            server.discard()
        self._folder.cleanup()


def _new_engine(kind: Kind) -> Engine:
    if kind.given is not None:
        return Given(kind.given)
    # As for the broker: the way to a container costs more than some of what is measured.
    program = kind.program()
    return Native(kind, program) if program is not None else new_engine_of_tests(kind)()
