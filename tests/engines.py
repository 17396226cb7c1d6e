"""What runs a RabbitMQ for a test: somebody else, a container, or a private native node.

An engine starts, kills and ends; whether the broker answers is asked by `tests.servers`. Everything here listens on
127.0.0.1 (a remote Docker engine excepted) and hangs on a leash, so that nothing outlives the program that started it.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.parse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from testcontainers.core.config import testcontainers_config
from testcontainers.core.container import DockerContainer
from testcontainers.core.docker_client import DockerClient

from eventbus.errors import hide_password

CTL_S = 180.0  # `rabbitmqctl` boots a virtual machine of its own: 1 s on an idle computer, a minute on a busy one


class NoBroker(Exception):  # a fact, and what to do about it
    """There is no RabbitMQ for the tests; the message says how to get one."""


class ServerError(Exception):
    """A broker did not do what a test asked of it."""


class Engine(Protocol):
    """What runs one RabbitMQ."""

    origin: str

    @property
    def url(self) -> str: ...

    @property
    def management_url(self) -> str: ...

    def start(self) -> None:
        """Run it, on the ports and with the data that it had before, and return at once."""

    def kill(self) -> None:
        """SIGKILL it; its data stays."""

    def shut_down(self) -> None:
        """Stop it in order; its data stays."""

    def discard(self) -> None:
        """End it and remove its data."""

    def ctl(self, *args: str) -> str:
        """What `rabbitmqctl ARGS` prints."""

    def log_tail(self) -> str:
        """The last lines that it logged."""


# ── somebody else's ───────────────────────────────────────────────────────────────────────────────────────────────────


class Given:
    """A broker that was named by its URL: tests use it, but do not start, stop or kill it."""

    def __init__(self, url: str, management_url: str | None = None) -> None:
        parts = urllib.parse.urlsplit(url)
        self.url = url
        self.management_url = management_url or f"http://{parts.hostname}:15672"
        self.origin = f"given as {hide_password(url)}"

    def start(self) -> None:
        """It runs already."""

    def discard(self) -> None:
        """It is not ours."""

    def kill(self) -> None:
        raise self._refusal("kill")

    def shut_down(self) -> None:
        raise self._refusal("stop")

    def ctl(self, *args: str) -> str:
        raise self._refusal("run rabbitmqctl " + " ".join(args) + " on")

    def log_tail(self) -> str:
        return "(its log is not ours to read)"

    def _refusal(self, what: str) -> ServerError:
        return ServerError(f"cannot {what} a broker that was {self.origin}: use the fixture `own_broker`")


# ── a container ───────────────────────────────────────────────────────────────────────────────────────────────────────


REMOVE_CONTAINER = """
import sys, docker
sys.stdin.read()
docker.from_env().containers.get(sys.argv[1]).remove(force=True, v=True)
"""


class Container:
    """A RabbitMQ in a container. Its ports are fixed, so that it keeps its URL when it is killed and started."""

    def __init__(self, image: str) -> None:
        testcontainers_config.ryuk_disabled = True  # the leash does its work, without an image of its own
        self.origin = f"container {image}"
        self._docker = DockerContainer(image)
        daemon = self._docker.get_docker_client().host()
        host = "127.0.0.1" if daemon == "localhost" else daemon
        ports = {"5672/tcp": free_port(), "15672/tcp": free_port()}
        for inside, outside in ports.items():
            # The client takes (address, port), though its type says a port; a port alone is open to the network.
            self._docker.ports[inside] = (host, outside) if host == "127.0.0.1" else outside  # type: ignore[assignment]
        self.url = f"amqp://guest:guest@{host}:{ports['5672/tcp']}/"
        self.management_url = f"http://{host}:{ports['15672/tcp']}"
        self._leash: Leash | None = None
        self._pid: int | None = None  # of its first process, as the engine's computer numbers it

    def start(self) -> None:
        if self._leash is None:
            self._docker.start()
            self._leash = Leash([sys.executable, "-c", REMOVE_CONTAINER, self._docker.get_container_id()])
        else:
            self._docker.get_wrapped_container().start()
        container = self._docker.get_wrapped_container()
        container.reload()
        self._pid = container.attrs["State"]["Pid"] or None

    def kill(self) -> None:
        container = self._docker.get_wrapped_container()
        if not self._kill_first_process():
            container.kill()
        container.wait(timeout=CTL_S)

    def _kill_first_process(self) -> bool:
        """SIGKILL it directly, where that is ours to do: within a millisecond, where the engine takes fifty."""
        if self._pid is None:
            return False
        try:
            # Behind an engine elsewhere, or in a virtual machine, that number is another process's here.
            if self._docker.get_container_id() not in Path(f"/proc/{self._pid}/cgroup").read_text():
                return False
            os.kill(self._pid, signal.SIGKILL)
        except OSError:
            return False
        return True

    def shut_down(self) -> None:
        with contextlib.suppress(ServerError):  # the command dies with the container
            self.ctl("shutdown")
        self._docker.get_wrapped_container().wait(timeout=CTL_S)

    def discard(self) -> None:
        if self._leash is not None:
            self._leash.let_go()
            self._leash = None
        self._docker.get_docker_client().client.close()

    def ctl(self, *args: str) -> str:
        container = self._docker.get_wrapped_container()
        container.reload()
        if container.status != "running":
            raise ServerError(f"rabbitmqctl {' '.join(args)}: the broker is down")
        code, (out, err) = container.exec_run(["rabbitmqctl", *args], demux=True)
        if code != 0:
            raise ServerError(f"rabbitmqctl {' '.join(args)} in {self.origin}: {(err or out or b'').decode().strip()}")
        return (out or b"").decode()

    def log_tail(self) -> str:
        logged: bytes = self._docker.get_wrapped_container().logs(tail=20)
        return logged.decode(errors="replace")


@functools.cache
def docker_client() -> DockerClient | None:
    """The Docker engine's client, or None where no engine answers."""
    # Asked in a process of its own: where nobody answers, the client leaves a socket open, which is a warning, and so
    # an error, in whatever test comes next.
    ping = "from testcontainers.core.docker_client import DockerClient; DockerClient().client.ping()"
    asked = subprocess.run([sys.executable, "-c", ping], capture_output=True, timeout=CTL_S)
    return DockerClient() if asked.returncode == 0 else None


def image_is_here(image: str) -> bool:
    """Whether the Docker engine holds *image*."""
    client = docker_client()
    return client is not None and any(image in found.tags for found in client.client.images.list())


def image_can_be_pulled(image: str) -> bool:
    """Whether a registry that the engine reaches has *image*: a question of a second, where the pull takes minutes."""
    client = docker_client()
    if client is None:
        return False
    try:
        client.client.images.get_registry_data(image)
    except Exception:  # no network, no registry, no such image: all the same here
        return False
    return True


# ── a private native node ─────────────────────────────────────────────────────────────────────────────────────────────


class Node:
    """A RabbitMQ of one's own from the installed package: own name, ports, cookie, data folder and port mapper."""

    def __init__(self, scripts: Path) -> None:
        self.origin = "native"
        self._scripts = scripts
        self._home = Path(tempfile.mkdtemp(prefix="eventbus-rabbitmq-"))
        amqp, management, distribution, mapper = (free_port() for _ in range(4))
        self.url = f"amqp://guest:guest@127.0.0.1:{amqp}/"
        self.management_url = f"http://127.0.0.1:{management}"
        (self._home / "plugins").write_text("[rabbitmq_management].\n")
        (self._home / "environment").touch()  # else /etc/rabbitmq's would be read
        (self._home / "advanced.config").write_text("[].\n")
        (self._home / "rabbitmq.conf").write_text(
            f"management.tcp.ip = 127.0.0.1\nmanagement.tcp.port = {management}\ndisk_free_limit.absolute = 50MB\n"
        )
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("RABBITMQ_", "ERL_"))},
            "HOME": str(self._home),  # holds the Erlang cookie
            "ERL_CRASH_DUMP": str(self._home / "erl_crash.dump"),
            "ERL_EPMD_PORT": str(mapper),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODENAME": f"eventbus-{amqp}@localhost",
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(amqp),
            "RABBITMQ_DIST_PORT": str(distribution),
            "RABBITMQ_CTL_DIST_PORT_MIN": str(distribution + 1),
            "RABBITMQ_CTL_DIST_PORT_MAX": str(distribution + 20),
            "RABBITMQ_MNESIA_BASE": str(self._home / "data"),
            "RABBITMQ_LOG_BASE": str(self._home / "log"),
            "RABBITMQ_LOGS": "-",
            "RABBITMQ_PID_FILE": str(self._home / "pid"),
            "RABBITMQ_CONF_ENV_FILE": str(self._home / "environment"),
            "RABBITMQ_CONFIG_FILE": str(self._home / "rabbitmq.conf"),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(self._home / "advanced.config"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self._home / "plugins"),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
        }
        self._process: subprocess.Popen[bytes] | None = None
        self._leash: Leash | None = None

    def start(self) -> None:
        # The port mapper belongs to the node's process group. Where none answered, Erlang would start one as a daemon,
        # which nobody would end.
        script = 'epmd & until epmd -names >/dev/null 2>&1; do sleep 0.05; done; exec "$0"'
        with (self._home / "rabbitmq.log").open("ab") as log:
            self._process = subprocess.Popen(
                ["sh", "-c", script, str(self._scripts / "rabbitmq-server")],
                cwd=self._home,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        end = 'read -r _; kill -s KILL -- "-$0"; rm -rf -- "$1"'
        self._leash = Leash(["sh", "-c", end, str(self._process.pid), str(self._home)])

    def kill(self) -> None:
        if self._process is None or self._leash is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        # Not before: whoever is interrupted in between still has it on the leash.
        self._leash.drop()
        self._process.wait(timeout=CTL_S)
        self._process = self._leash = None

    def shut_down(self) -> None:
        if self._process is None:
            return
        try:
            self.ctl("shutdown")
        finally:  # what is left: the port mapper, and the node itself if it did not hear
            self.kill()

    def discard(self) -> None:
        self.kill()
        shutil.rmtree(self._home, ignore_errors=True)

    def ctl(self, *args: str) -> str:
        if self._process is None:  # the command would start a port mapper, as a daemon that nobody ends
            raise ServerError(f"rabbitmqctl {' '.join(args)}: the broker is down")
        command = [str(self._scripts / "rabbitmqctl"), *args]
        done = subprocess.run(
            command, env=self._environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=CTL_S
        )
        if done.returncode != 0:
            raise ServerError(f"rabbitmqctl {' '.join(args)}: {(done.stderr or done.stdout).strip()}")
        return done.stdout

    def log_tail(self) -> str:
        lines = (self._home / "rabbitmq.log").read_text(errors="replace").splitlines()
        return "\n".join(lines[-20:])


def native_scripts() -> Path | None:
    """The folder of RabbitMQ's own scripts, or None where it is not installed.

    Debian's commands in /usr/sbin are wrappers that insist on the user `rabbitmq` and on /var/lib/rabbitmq; the real
    ones run as anybody.
    """
    for folder in (Path("/usr/lib/rabbitmq/bin"), *_folder_of_command("rabbitmq-server")):
        if (folder / "rabbitmq-server").exists() and (folder / "rabbitmqctl").exists():
            return folder
    return None


def _folder_of_command(name: str) -> Sequence[Path]:
    found = shutil.which(name)
    return [] if found is None else [Path(found).resolve().parent]


def native_version(scripts: Path) -> str:
    """The version of the installed RabbitMQ, read off its files: `rabbitmqctl version` leaves a port mapper running."""
    release = (scripts / "rabbitmq-server").resolve().parent.parent
    found = [path.name.removeprefix("rabbit-") for path in (release / "plugins").glob("rabbit-[0-9]*")]
    if len(found) != 1:
        raise NoBroker(f"cannot tell the version of the RabbitMQ in {release}: reinstall rabbitmq-server")
    return found[0].removesuffix(".ez")


def install_native() -> Path | None:
    """Install Debian's rabbitmq-server if we may; the folder of its scripts, or None."""
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        return None
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", "rabbitmq-server"]
    with no_services_started():
        for command in (["apt-get", "update", "-qq"], install):
            done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
            if done.returncode != 0:
                raise NoBroker(f"`{' '.join(command)}` failed: {done.stderr.strip()[-500:]}")
    return native_scripts()


@contextlib.contextmanager
def no_services_started() -> Iterator[None]:
    """While packages are installed: Debian asks this file whether a service may start, and 101 says no."""
    policy = Path("/usr/sbin/policy-rc.d")
    if policy.exists():
        yield
        return
    policy.write_text("#!/bin/sh\nexit 101\n")
    policy.chmod(0o755)
    try:
        yield
    finally:
        policy.unlink()


# ── ports and leashes ─────────────────────────────────────────────────────────────────────────────────────────────────


def free_port() -> int:
    """A port of 127.0.0.1 that nobody uses.

    Below the range from which the system takes ports for outgoing connections, else one of those could take the port
    of a broker that is down for a moment.
    """
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class Leash:
    """A process that runs to its end once our end of its pipe closes: when we let go, or when we are gone."""

    def __init__(self, command: Sequence[str]) -> None:
        # A session of its own: Ctrl-C on the terminal must not end it before it has done its work.
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)

    def let_go(self) -> None:
        """Have it end what it holds, and wait until it has."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=CTL_S)

    def drop(self) -> None:
        """Take it away without ending anything."""
        assert self._process.stdin is not None
        self._process.kill()
        self._process.stdin.close()
        self._process.wait(timeout=CTL_S)
