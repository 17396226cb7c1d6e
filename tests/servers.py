"""Where tests get brokers. A test asks for a line ("3.10") and gets a real RabbitMQ of it, never a skip.

A line is looked for in this order; what is here already goes before what must be fetched:

1. given: `EVENTBUS_TEST_URL_3_10=amqp://...`, or `EVENTBUS_TEST_URL`, whatever its line. The management API is expected
   on port 15672 of the same host, or where `EVENTBUS_TEST_MANAGEMENT_URL` says
2. a container of an image that the Docker engine holds
3. a private node of the RabbitMQ that is installed here, if it is of that line
4. a container of an image that the engine can pull

Where none of the lines is found, `rabbitmq-server` is installed through apt if we may; else the error says what to do.

    python -m tests.servers [--line 4.3] [--write FILE] [-- COMMAND...]     a RabbitMQ of one's own
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import functools
import http.client
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from eventbus.errors import hide_password
from tests.engines import (
    Container,
    Engine,
    Given,
    NoBroker,
    Node,
    ServerError,
    image_can_be_pulled,
    image_is_here,
    install_native,
    native_scripts,
    native_version,
)

if TYPE_CHECKING:
    import pytest  # `make broker` does without

__all__ = ["LINES", "BrokerServer", "Brokers", "NoBroker", "ServerError", "find_lines", "find_own_lines"]

# The oldest first: it is the default, since what it lacks is what breaks.
LINES = ("3.10", "4.0", "4.3")
HOW_TO_GET = (
    "set EVENTBUS_TEST_URL=amqp://..., or start a Docker engine that holds or can pull rabbitmq:{line}-management,"
    " or install rabbitmq-server (Debian: apt-get install rabbitmq-server)"
)
START_S = 180.0  # a node needs 4 to 10 s on two idle cores, and several times that on a busy computer


# ── a broker as a test sees it ────────────────────────────────────────────────────────────────────────────────────────


class BrokerServer:
    """One running RabbitMQ. Tests keep apart by `new_vhost`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._vhosts: list[str] = []
        self.version = ""
        self.is_running = False

    @property
    def url(self) -> str:
        """The URL of its default virtual host."""
        return self._engine.url

    @property
    def management_url(self) -> str:
        """Where its management interface is, without a login: it is the URL's."""
        return self._engine.management_url

    @property
    def line(self) -> str:
        """`3.10`, `4.0`, `4.3`, or what else was found."""
        return line_of(self.version)

    @property
    def origin(self) -> str:
        """What it is and where it came from, for the report."""
        return f"RabbitMQ {self.version}, {self._engine.origin}"

    def start(self) -> None:
        """Start it, with the ports and the data that it had; it answers when this returns."""
        self._engine.start()
        try:
            self.version = wait_until_ready(self._engine)
        except ServerError:
            self._engine.discard()
            raise
        self.is_running = True

    def kill(self) -> None:
        """SIGKILL it, as a crash would; `start` brings it back with what it had stored.

        A single node forgets a quorum queue that was declared within the last second (the registration of its log is
        written behind, on every line): `restart` once after declaring, where the test is not about that.
        """
        self._engine.kill()
        self.is_running = False

    def stop(self) -> None:
        """Shut it down in order; `start` brings it back with what it had stored."""
        self.is_running = False  # even if it fails: the next test starts it
        self._engine.shut_down()

    def restart(self) -> None:
        """Stop it in order and start it again."""
        self.stop()
        self.start()

    def discard(self) -> None:
        """End it for good."""
        self._engine.discard()
        self.is_running = False

    def ctl(self, *args: str) -> str:
        """What `rabbitmqctl --quiet ARGS` prints. It takes a second: prefer `api` where both know the answer."""
        return self._engine.ctl("--quiet", *args)

    @contextlib.asynccontextmanager
    async def taking_at_most(self, largest: int) -> AsyncIterator[None]:
        """It takes no message over so many bytes, until the block is left. What is usual is another for each line."""
        usual = (
            await asyncio.to_thread(self.ctl, "eval", "rabbit_misc:get_env(rabbit, max_message_size, none).")
        ).strip()
        limit = "application:set_env(rabbit, max_message_size, {0}), persistent_term:put(max_message_size, {0})."
        await asyncio.to_thread(self.ctl, "eval", limit.format(largest))
        try:
            yield
        finally:
            await asyncio.to_thread(self.ctl, "eval", limit.format(usual))

    def api(self, method: str, path: str, body: Mapping[str, object] | None = None) -> object:
        """What the management API answers, for example to `api("GET", "/queues/%2F")`."""
        return call_api(self._engine, method, path, body)

    def new_vhost(self) -> str:
        """The URL of a fresh virtual host, with every permission."""
        name = f"test-{secrets.token_hex(4)}"
        self.api("PUT", f"/vhosts/{name}", {})
        self._vhosts.append(name)
        url = at_vhost(self.url, name)
        self.set_permissions(url)
        return url

    def drop_vhosts(self) -> None:
        """Remove what `new_vhost` made, with all that is in it."""
        while self._vhosts:
            self.api("DELETE", f"/vhosts/{self._vhosts.pop()}")

    def add_user(self, url: str, *, configure: str = ".*", write: str = ".*", read: str = ".*") -> str:
        """The URL of *url*'s virtual host for a new user, who may do what the three patterns say."""
        name, password = f"user-{secrets.token_hex(4)}", secrets.token_hex(8)
        self.api("PUT", f"/users/{name}", {"password": password, "tags": ""})
        url = with_login(url, name, password)
        self.set_permissions(url, configure=configure, write=write, read=read)
        return url

    def set_permissions(self, url: str, *, configure: str = ".*", write: str = ".*", read: str = ".*") -> None:
        """Change what *url*'s user may do in *url*'s virtual host."""
        user = urllib.parse.urlsplit(url).username or "guest"
        where = f"/permissions/{urllib.parse.quote(vhost_of(url), safe='')}/{user}"
        self.api("PUT", where, {"configure": configure, "write": write, "read": read})


def line_of(version: str) -> str:
    """`3.10.8` is of the line `3.10`."""
    return ".".join(version.split(".")[:2])


def at_vhost(url: str, vhost: str) -> str:
    """*url* with another virtual host."""
    return urllib.parse.urlsplit(url)._replace(path="/" + urllib.parse.quote(vhost, safe="")).geturl()


def vhost_of(url: str) -> str:
    """The virtual host that *url* names."""
    return urllib.parse.unquote(urllib.parse.urlsplit(url).path[1:]) or "/"


def with_login(url: str, user: str, password: str) -> str:
    """*url* with another user."""
    parts = urllib.parse.urlsplit(url)
    return parts._replace(netloc=f"{user}:{password}@{parts.hostname}:{parts.port or 5672}").geturl()


# ── asking a broker ───────────────────────────────────────────────────────────────────────────────────────────────────


def ask_version(url: str) -> str | None:
    """The version that a broker states in its first frame, or None while nobody answers.

    A published container port accepts connections before the broker does, so a connection alone proves nothing.
    """
    parts = urllib.parse.urlsplit(url)
    try:
        with socket.create_connection((parts.hostname or "127.0.0.1", parts.port or 5672), timeout=2) as connection:
            connection.sendall(b"AMQP\x00\x00\x09\x01")
            start = connection.recv(4096)
    except OSError:
        return None
    stated = re.search(rb"\x07versionS\x00\x00\x00.([0-9.]+)", start, re.DOTALL)
    return stated[1].decode() if stated else None


def wait_until_ready(engine: Engine) -> str:
    """The version of a broker that has just been started, once it answers on both of its ports."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        version = ask_version(engine.url)
        if version is not None and answers_http(engine):
            return version
        time.sleep(0.1)
    raise ServerError(f"{engine.origin} did not answer within {START_S:.0f} s; its log ends:\n{engine.log_tail()}")


def answers_http(engine: Engine) -> bool:
    """Whether the management API is up."""
    try:
        call_api(engine, "GET", "/whoami")
    except (OSError, http.client.HTTPException):
        return False
    return True


def call_api(engine: Engine, method: str, path: str, body: Mapping[str, object] | None = None) -> object:
    """Ask the management API, as the user of the broker's URL."""
    login = urllib.parse.urlsplit(engine.url)
    server = urllib.parse.urlsplit(engine.management_url)
    basic = base64.b64encode(f"{login.username or 'guest'}:{login.password or 'guest'}".encode()).decode()
    headers = {"Authorization": f"Basic {basic}", "Content-Type": "application/json"}
    connection = http.client.HTTPConnection(server.hostname or "127.0.0.1", server.port or 15672, timeout=30)
    with contextlib.closing(connection):
        connection.request(method, "/api" + path, None if body is None else json.dumps(body), headers)
        response = connection.getresponse()
        answer = response.read()
    if response.status >= 400:
        raise ServerError(f"{engine.origin}: {method} {path} said {response.status}: {answer.decode()}")
    return json.loads(answer) if answer else None


# ── finding brokers ───────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Source:
    """Where a line's broker comes from."""

    says: str
    new_engine: Callable[[], Engine]


@functools.cache
def find_lines() -> Mapping[str, Source]:
    """The lines that tests can have here, the default one first. Nothing is started.

    Raises:
        NoBroker: there is none, and none could be installed.
    """
    given = given_lines()
    return given | {line: source for line, source in lines_of_ours().items() if line not in given} or installed_line()


def lines_to_test(lines: Mapping[str, Source], config: pytest.Config) -> list[str]:
    """All of *lines* with `--all-lines`, else the default one."""
    return list(lines) if config.getoption("all_lines") else list(lines)[:1]


@functools.cache
def find_own_lines() -> Mapping[str, Source]:
    """As `find_lines`, without what was given: the lines that tests may stop and kill."""
    return lines_of_ours() or installed_line()


@functools.cache
def lines_of_ours() -> dict[str, Source]:
    """What runs here in a container or natively."""
    native = native_line(native_scripts())
    found = {line: source for line in LINES if (source := container_line(line, native) or native.get(line))}
    return found or native


def container_line(line: str, native: Mapping[str, Source]) -> Source | None:
    """A container of *line*; what is installed goes before an image that must be pulled."""
    image = f"rabbitmq:{line}-management"
    if image_is_here(image) or (line not in native and image_can_be_pulled(image)):
        return Source(f"container {image}", lambda: Container(image))
    return None


def native_line(scripts: Path | None) -> dict[str, Source]:
    """The installed RabbitMQ by its line."""
    if scripts is None:
        return {}
    version = native_version(scripts)
    return {line_of(version): Source(f"native RabbitMQ {version}", lambda: Node(scripts))}


def installed_line() -> dict[str, Source]:
    """RabbitMQ from the distribution, where we may install it."""
    found = native_line(install_native())
    if not found:
        raise NoBroker(f"no RabbitMQ for the tests: {HOW_TO_GET.format(line=LINES[-1])}")
    return found


def given_lines() -> dict[str, Source]:
    """The brokers that were named by URL, by their lines."""
    found: dict[str, Source] = {}
    for name in ("EVENTBUS_TEST_URL", *(f"EVENTBUS_TEST_URL_{line.replace('.', '_')}" for line in LINES)):
        if url := os.environ.get(name):
            version = ask_version(url)
            if version is None:
                raise NoBroker(f"nothing speaks AMQP at {name}={hide_password(url)}: start a broker there, or unset it")
            found.setdefault(line_of(version), given_source(url))
    return found


def given_source(url: str) -> Source:
    """A broker that was named by its URL."""
    shown, management_url = hide_password(url), os.environ.get("EVENTBUS_TEST_MANAGEMENT_URL")
    return Source(f"given as {shown}", lambda: Given(url, management_url))


# ── one server per line ───────────────────────────────────────────────────────────────────────────────────────────────


class Brokers:
    """The brokers of one test session: started when first asked for, one per line, ended together."""

    def __init__(self) -> None:
        self._shared: dict[str, BrokerServer] = {}
        self._own: dict[str, BrokerServer] = {}

    def shared(self, line: str | None = None) -> BrokerServer:
        """The running broker of *line*, or of the default line, that many tests use."""
        return _running(self._shared, find_lines(), line)

    def own(self, line: str | None = None) -> BrokerServer:
        """A running broker that the caller may stop and kill; never one that was given."""
        return _running(self._own, find_own_lines(), line)

    def started(self) -> list[BrokerServer]:
        """All that were started."""
        return [*self._shared.values(), *self._own.values()]

    def close(self) -> None:
        """End them all."""
        for server in self.started():
            server.discard()


def _running(servers: dict[str, BrokerServer], sources: Mapping[str, Source], line: str | None) -> BrokerServer:
    line = line or next(iter(sources))
    if line not in sources:
        raise NoBroker(f"no RabbitMQ {line} here (there is: {', '.join(sources)}): {HOW_TO_GET.format(line=line)}")
    server = servers.get(line)
    if server is None:
        server = servers[line] = BrokerServer(sources[line].new_engine())
    if not server.is_running:
        server.start()
    return server


# ── a broker for a person ─────────────────────────────────────────────────────────────────────────────────────────────


def main() -> int:
    """`python -m tests.servers`: a RabbitMQ of one's own, until Ctrl-C or for as long as COMMAND runs."""
    parser = argparse.ArgumentParser(prog="python -m tests.servers", description=main.__doc__)
    parser.add_argument("--line", help=f"the broker line: {', '.join(LINES)} (default: a container of the newest)")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the URL into FILE, and remove it at the end")
    parser.add_argument("command", nargs="*", help="run this with EVENTBUS_URL set, and end with it")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    brokers = Brokers()
    try:
        server = brokers.own(options.line or line_for_a_person())
        print(f"# {server.origin}; management: {server.management_url} (guest, guest)")
        print(f"EVENTBUS_URL={server.url}", flush=True)
        if options.write:
            options.write.write_text(server.url + "\n")
        if options.command:
            return run_with(server.url, options.command)
        signal.pause()
    except NoBroker as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0
    finally:
        # The end takes a while, and impatience must not leave a broker behind that nobody knows of.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        if options.write:
            options.write.unlink(missing_ok=True)
        brokers.close()
    return 0


def run_with(url: str, command: Sequence[str]) -> int:
    """Run *command* on the broker at *url*; its exit code.

    Ctrl-C on a terminal reaches the command too, which may need a while to end in order: we wait. SIGTERM is passed on.
    """
    process = subprocess.Popen(command, env={**os.environ, "EVENTBUS_URL": url})
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    return process.wait()


def line_for_a_person() -> str:
    """The newest line that a container gives, else what there is."""
    sources = find_own_lines()
    containers = [line for line, source in sources.items() if source.says.startswith("container")]
    return containers[-1] if containers else next(iter(sources))


if __name__ == "__main__":
    sys.exit(main())
