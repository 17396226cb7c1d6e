"""Where tests get databases: a real PostgreSQL, a real Redis, never a skip. As brokers are (`tests.servers`), from:

1. given: `EVENTBUS_TEST_POSTGRESQL_URL`, whose user may create databases; `EVENTBUS_TEST_REDIS_URL`, whose databases
   are emptied
2. a container of an image that the Docker engine holds
3. a private process of what is installed here; else a container of an image that the engine can pull
4. what apt installs, where we may
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol  # Any: what a coroutine is sent, which nobody does

import asyncpg
from sqlalchemy import update
from testcontainers.core.config import testcontainers_config
from testcontainers.core.container import DockerContainer

from eventbus.database import KEYS, create, open_engine
from eventbus.errors import hide_password
from tests.engines import (
    CTL_S,
    REMOVE_CONTAINER,
    Leash,
    ServerError,
    free_port,
    image_can_be_pulled,
    image_is_here,
    no_services_started,
)

START_S = 60.0  # a second on an idle computer
PASSWORD = "let-me-in"


class NoStore(Exception):  # a fact, and what to do about it
    """There is no such database for the tests; the message says how to get one."""


# ── the two kinds ─────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class Kind:
    """A database product: how it is found, started and asked whether it is there."""

    name: str
    image: str
    port: int  # inside its container
    url: str  # with {host} and {port}
    package: str
    program: Callable[[], Path | None]
    prepare: Callable[[Path, Path], None]  # the program, a folder
    command: Callable[[Path, Path, int], list[str]]  # the program, the folder, a port
    user: str | None  # who runs it where we are root
    answers: Callable[[str], bool]
    variables: dict[str, str] = field(default_factory=dict)
    arguments: str = ""

    @property
    def given(self) -> str | None:
        return os.environ.get(self.variable)

    @property
    def variable(self) -> str:
        return f"EVENTBUS_TEST_{self.name.upper()}_URL"


def _postgres() -> Path | None:
    """`postgres` stands beside its other programs, and Debian keeps them off the PATH."""
    found = [Path(found) for found in [shutil.which("postgres")] if found]
    found += sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), reverse=True)
    return found[0].resolve() if found else None


def _initdb(postgres: Path, folder: Path) -> None:
    if (folder / "data").exists():
        return
    (folder / "password").write_text(PASSWORD)
    user = as_user("postgres")
    if user is not None:
        for path in (folder, folder / "password"):
            shutil.chown(path, user)
    command = [str(postgres.with_name("initdb")), "-D", str(folder / "data"), "--no-sync"]
    command += ["-U", "postgres", "-A", "scram-sha-256", "--pwfile", str(folder / "password")]
    done = subprocess.run(command, user=user, cwd=folder, capture_output=True, text=True, timeout=CTL_S)
    if done.returncode != 0:
        raise ServerError(f"initdb failed: {done.stderr.strip()}")


def _postgres_answers(url: str) -> bool:
    async def ask() -> None:
        await (await asyncpg.connect(url, timeout=5)).close()

    try:
        apart(ask())
    except (OSError, asyncpg.PostgresError, TimeoutError):
        return False
    return True


def _redis_answers(url: str) -> bool:
    parts = urllib.parse.urlsplit(url)
    try:
        with socket.create_connection((parts.hostname or "127.0.0.1", parts.port or 6379), timeout=2) as connection:
            if parts.password:
                connection.sendall(f"AUTH {parts.username or 'default'} {parts.password}\r\n".encode())
                connection.recv(100)
            connection.sendall(b"PING\r\n")
            return connection.recv(100).startswith(b"+PONG")
    except OSError:
        return False


def _redis_server() -> Path | None:
    found = shutil.which("redis-server")
    return Path(found) if found else None


POSTGRESQL = Kind(
    "postgresql",
    "postgres:17",
    5432,
    f"postgresql://postgres:{PASSWORD}@{{host}}:{{port}}/postgres",
    "postgresql",
    _postgres,
    _initdb,
    # Killed processes lose nothing that was written; only a computer that stops would.
    lambda program, folder, port: [
        *(str(program), "-D", str(folder / "data"), "-p", str(port), "-c", "listen_addresses=127.0.0.1"),
        *("-c", "unix_socket_directories=", "-c", "fsync=off", "-c", "max_connections=200"),
    ],
    "postgres",
    _postgres_answers,
    {"POSTGRES_PASSWORD": PASSWORD},
    "-c fsync=off -c max_connections=200",
)
REDIS = Kind(
    "redis",
    "redis:8",
    6379,
    "redis://{host}:{port}/0",
    "redis-server",
    _redis_server,
    lambda program, folder: None,
    lambda program, folder, port: [
        *(str(program), "--bind", "127.0.0.1", "--port", str(port), "--dir", str(folder)),
        *("--save", "", "--appendonly", "yes", "--appendfsync", "always"),
    ],
    None,
    _redis_answers,
    arguments="--protected-mode no --save '' --appendonly yes --appendfsync always",
)
KINDS = {kind.name: kind for kind in (POSTGRESQL, REDIS)}


def as_user(name: str) -> str | None:
    """*name* where we are root and there is such a user, else None: as whoever we are."""
    if os.geteuid() != 0:
        return None
    with contextlib.suppress(KeyError):
        return pwd.getpwnam(name).pw_name
    return None


# ── what runs one ─────────────────────────────────────────────────────────────────────────────────────────────────────


class Engine(Protocol):
    """What runs one database server; as `tests.engines` has it for brokers."""

    url: str
    origin: str

    def start(self) -> None:
        """Run it, on the port and with the data that it had before, and return at once."""

    def kill(self) -> None:
        """SIGKILL it; its data stays."""

    def discard(self) -> None:
        """End it and remove its data."""


class Given:
    """Somebody else's."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.origin = f"given as {hide_password(url)}"

    def start(self) -> None:
        """It runs already."""

    def kill(self) -> None:
        raise ServerError(f"cannot kill a database that was {self.origin}: ask for one of your own")

    def discard(self) -> None:
        """It is not ours."""


class InContainer:
    """One in a container, with a port that it keeps."""

    def __init__(self, kind: Kind) -> None:
        testcontainers_config.ryuk_disabled = True  # the leash does its work
        self.origin = f"container {kind.image}"
        self._docker = DockerContainer(kind.image)
        for name, value in kind.variables.items():
            self._docker.with_env(name, value)
        if kind.arguments:
            program = "postgres" if kind.name == POSTGRESQL.name else "redis-server"
            self._docker.with_command(f"{program} {kind.arguments}")
        daemon = self._docker.get_docker_client().host()
        host = "127.0.0.1" if daemon == "localhost" else daemon
        port = free_port()
        # The client takes (address, port), though its type says a port; a port alone is open to the network.
        self._docker.ports[f"{kind.port}/tcp"] = (host, port) if host == "127.0.0.1" else port  # type: ignore[assignment]
        self.url = kind.url.format(host=host, port=port)
        self._leash: Leash | None = None

    def start(self) -> None:
        if self._leash is None:
            self._docker.start()
            self._leash = Leash([sys.executable, "-c", REMOVE_CONTAINER, self._docker.get_container_id()])
        else:
            self._docker.get_wrapped_container().start()

    def kill(self) -> None:
        container = self._docker.get_wrapped_container()
        container.kill()
        container.wait(timeout=CTL_S)

    def discard(self) -> None:
        if self._leash is not None:
            self._leash.let_go()
            self._leash = None
        self._docker.get_docker_client().client.close()


def children_of(pid: int) -> list[int]:
    """Who was started by process *pid*, and lives. None where there is no /proc."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            parent = stat.read_text().rpartition(")")[2].split()[1]  # behind its name, which may be anything
            if int(parent) == pid:
                found.append(int(stat.parent.name))
    return found


class Native:
    """A private process of the installed program: own port, own folder, on a leash."""

    def __init__(self, kind: Kind, program: Path) -> None:
        self.origin = f"native {program.name}"
        self._kind, self._program = kind, program
        self._folder = Path(tempfile.mkdtemp(prefix=f"eventbus-{kind.name}-"))
        self._port = free_port()
        self.url = kind.url.format(host="127.0.0.1", port=self._port)
        self._process: subprocess.Popen[bytes] | None = None
        self._leash: Leash | None = None

    def start(self) -> None:
        self._kind.prepare(self._program, self._folder)
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                self._kind.command(self._program, self._folder, self._port),
                user=as_user(self._kind.user) if self._kind.user else None,
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        # As a group: a PostgreSQL whose children live on does not start again.
        end = 'read -r _; kill -s KILL -- "-$0"; rm -rf -- "$1"'
        self._leash = Leash(["sh", "-c", end, str(self._process.pid), str(self._folder)])

    def kill(self) -> None:
        if self._process is None or self._leash is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, signal.SIGSTOP)  # so that it starts no more of them
        # PostgreSQL's processes each lead a group of their own. Left to themselves they see that the first one is gone,
        # but not at once: until then they answer.
        for pid in [self._process.pid, *children_of(self._process.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._leash.drop()
        self._process.wait(timeout=CTL_S)
        self._process = self._leash = None

    def discard(self) -> None:
        self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)


# ── one as a test sees it ─────────────────────────────────────────────────────────────────────────────────────────────


class StoreServer:
    """One running PostgreSQL or Redis. Tests keep apart by `new_url`."""

    def __init__(self, kind: Kind, engine: Engine) -> None:
        self._kind, self._engine = kind, engine
        self._databases: list[str] = []
        self.is_running = False

    @property
    def origin(self) -> str:
        return f"{self._kind.name}: {self._engine.origin}"

    def start(self) -> None:
        """Start it, with the port and the data that it had; it answers when this returns."""
        self._engine.start()
        deadline = time.monotonic() + START_S
        while not self._kind.answers(self._engine.url):
            if time.monotonic() > deadline:
                self._engine.discard()
                raise ServerError(f"{self.origin} did not answer within {START_S:.0f} s")
            time.sleep(0.05)
        self.is_running = True

    def kill(self) -> None:
        """SIGKILL it, as a crash would; `start` brings it back with what it had stored."""
        self._engine.kill()
        self.is_running = False

    def discard(self) -> None:
        self._engine.discard()
        self.is_running = False

    def new_url(self, last_word: str = "") -> str:
        """The URL of an empty database, whose name ends with *last_word*.

        On a Redis it is the same one for all tests of this process, emptied.
        """
        if self._kind.name == REDIS.name:
            url = urllib.parse.urlsplit(self._engine.url)._replace(path=f"/{_redis_database()}").geturl()
            apart(_empty_redis(url))
            return url
        name = f"test_{secrets.token_hex(4)}{last_word}"
        apart(_execute(self._engine.url, f"CREATE DATABASE {name}"))
        self._databases.append(name)
        return urllib.parse.urlsplit(self._engine.url)._replace(path=f"/{name}").geturl()

    def drop(self) -> None:
        """Remove what `new_url` made."""
        while self._databases:
            apart(_execute(self._engine.url, f"DROP DATABASE {self._databases.pop()} WITH (FORCE)"))


def _redis_database() -> int:
    """A number of its own for each process that runs tests: they may share a Redis that was given."""
    return int("".join(filter(str.isdigit, os.environ.get("PYTEST_XDIST_WORKER", "0")))) % 16


async def _empty_redis(url: str) -> None:
    from redis.asyncio import Redis

    async with Redis.from_url(url) as redis:
        await redis.flushdb()


async def _execute(url: str, statement: str) -> None:
    connection = await asyncpg.connect(url)
    try:
        await connection.execute(statement)
    finally:
        await connection.close()


def apart(talk: Coroutine[Any, Any, object]) -> None:
    """Run *talk* to its end in a loop and a thread of its own, whether or not a loop runs here."""
    with ThreadPoolExecutor(1) as thread:
        thread.submit(asyncio.run, talk).result()


# ── what is in one ────────────────────────────────────────────────────────────────────────────────────────────────────

_OLDER = """
for _, key in ipairs(redis.call('KEYS', 'eventbus:*')) do
    local value, left = redis.call('GET', key), redis.call('PTTL', key) - ARGV[1]
    if left <= 0 then
        redis.call('DEL', key)
    else
        value = string.gsub(value, '^%d+', function(ends) return string.format('%.0f', ends - ARGV[1]) end)
        redis.call('SET', key, value, 'PX', string.format('%.0f', left))
    end
end
"""


async def make_tables(url: str) -> None:
    """Make the bus's tables in the database at *url*; a Redis needs none."""
    if not url.startswith("redis"):
        engine = open_engine(url)
        try:
            await create(engine)
        finally:
            await engine.dispose()


async def let_pass(url: str, by: timedelta) -> None:
    """Make time pass in the idempotency store at *url*: whatever ends in it ends *by* sooner.

    A lease of half a minute, and a week that a success is remembered, need not be waited for.
    """
    by_ms = by // timedelta(milliseconds=1)
    if url.startswith("redis"):
        from redis.asyncio import Redis

        async with Redis.from_url(url) as redis:
            await redis.eval(_OLDER, 0, str(by_ms))
        return
    engine = open_engine(url)
    try:
        async with engine.begin() as connection:
            await connection.execute(update(KEYS).values(expires_ms=KEYS.c.expires_ms - by_ms))
    finally:
        await engine.dispose()


# ── finding them ──────────────────────────────────────────────────────────────────────────────────────────────────────


@functools.cache
def new_engine(kind: Kind) -> Callable[[], Engine]:
    """What makes an engine of *kind* of our own. Nothing is started.

    Raises:
        NoStore: there is none, and none could be installed.
    """
    program = kind.program()
    if image_is_here(kind.image) or (program is None and image_can_be_pulled(kind.image)):
        return lambda: InContainer(kind)
    program = program or install(kind)
    if program is None:
        raise NoStore(
            f"no {kind.name} for the tests: set {kind.variable}, or start a Docker engine that holds or can pull "
            f"{kind.image}, or install {kind.package} (Debian: apt-get install {kind.package})"
        )
    return lambda: Native(kind, program)


def install(kind: Kind) -> Path | None:
    """The program from the distribution, where we may install it."""
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        return None
    with no_services_started():
        commands = (["apt-get", "update", "-qq"], ["apt-get", "install", "-y", "-qq", kind.package])
        for command in commands:
            done = subprocess.run(
                command,
                env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
            )
            if done.returncode != 0:
                raise NoStore(f"`{' '.join(command)}` failed: {done.stderr.strip()[-500:]}")
    return kind.program()


class Stores:
    """The databases of one test session: started when first asked for, one of a kind, ended together."""

    def __init__(self) -> None:
        self._shared: dict[str, StoreServer] = {}
        self._own: dict[str, StoreServer] = {}

    def shared(self, name: str) -> StoreServer:
        """The running `postgresql` or `redis` that many tests use."""
        given = KINDS[name].given
        return _running(self._shared, KINDS[name], new_engine(KINDS[name]) if given is None else lambda: Given(given))

    def own(self, name: str) -> StoreServer:
        """A running one that the caller may kill; never one that was given."""
        return _running(self._own, KINDS[name], new_engine(KINDS[name]))

    def started(self) -> Sequence[StoreServer]:
        return [*self._shared.values(), *self._own.values()]

    def close(self) -> None:
        for server in self.started():
            server.discard()


def _running(servers: dict[str, StoreServer], kind: Kind, engine: Callable[[], Engine]) -> StoreServer:
    server = servers.get(kind.name)
    if server is None:
        server = servers[kind.name] = StoreServer(kind, engine())
    if not server.is_running:
        server.start()
    return server
