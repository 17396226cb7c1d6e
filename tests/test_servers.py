"""The brokers that tests get are real, keep tests apart, and come back with what they had stored."""

from __future__ import annotations

import itertools
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing, suppress

import pika
import pika.exceptions
import pytest

from tests.engines import Given
from tests.servers import BrokerServer, ServerError, ask_version, find_own_lines

QUORUM = {"x-queue-type": "quorum"}


def store(url: str, body: bytes) -> None:
    with closing(pika.BlockingConnection(pika.URLParameters(url))) as connection:
        channel = connection.channel()
        channel.queue_declare("kept", durable=True, arguments=QUORUM)
        channel.confirm_delivery()
        channel.basic_publish("", "kept", body, pika.BasicProperties(delivery_mode=2), mandatory=True)


def take(url: str, count: int = 1) -> list[bytes]:
    """The bodies of the first *count* messages; a queue may need some seconds after a restart to find its leader."""
    with closing(pika.BlockingConnection(pika.URLParameters(url))) as connection:
        deliveries = connection.channel().consume("kept", inactivity_timeout=10)
        return [body for _, _, body in itertools.islice(deliveries, count) if body is not None]


def test_a_virtual_host_is_apart_from_the_next(every_line: BrokerServer) -> None:
    one, other = every_line.new_vhost(), every_line.new_vhost()

    store(one, b"here")

    assert take(one) == [b"here"]
    with pytest.raises(pika.exceptions.ChannelClosedByBroker, match="NOT_FOUND"):
        take(other)


def test_a_broker_is_of_the_line_that_was_asked_for(every_line: BrokerServer, request: pytest.FixtureRequest) -> None:
    asked_for = request.node.callspec.params["every_line"]

    assert every_line.line == asked_for
    assert ask_version(every_line.url) == every_line.version
    assert every_line.version in every_line.origin


def test_what_was_confirmed_survives_a_restart_and_a_kill(own_broker_of_every_line: BrokerServer) -> None:
    server = own_broker_of_every_line
    url = server.new_vhost()
    store(url, b"one")

    server.restart()  # first: see BrokerServer.kill
    store(url, b"two")
    server.kill()
    assert ask_version(url) is None
    with pytest.raises(ServerError):
        server.ctl("status")
    server.start()

    assert take(url, 2) == [b"one", b"two"]


def test_rabbitmqctl_speaks_to_this_broker(own_broker_of_every_line: BrokerServer) -> None:
    vhost = own_broker_of_every_line.new_vhost().rsplit("/", 1)[1]

    listed = own_broker_of_every_line.ctl("list_vhosts", "name")

    assert vhost in listed.split()
    with pytest.raises(ServerError, match="no_such_command"):
        own_broker_of_every_line.ctl("no_such_command")


def test_a_user_may_do_what_was_granted_and_no_more(broker: BrokerServer, rabbitmq_url: str) -> None:
    store(rabbitmq_url, b"for a reader")
    reader = broker.add_user(rabbitmq_url, configure="", write="", read="kept")

    assert take(reader) == [b"for a reader"]
    with pytest.raises(pika.exceptions.ChannelClosedByBroker, match="ACCESS_REFUSED"):
        store(reader, b"not allowed")


def test_a_given_broker_is_not_ours_to_break() -> None:
    given = BrokerServer(Given("amqp://ada:secret@broker.example/"))

    with pytest.raises(ServerError, match=re.escape("a broker that was given as amqp://ada:***@broker.example/")):
        given.kill()


STARTS_AND_DIES = """
import os, signal, sys
from tests.servers import Brokers
print(Brokers().own(sys.argv[1]).url, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


# One line of each kind: "container", "native".
KINDS = {source.says.split()[0]: line for line, source in find_own_lines().items()}


@pytest.mark.parametrize("line", KINDS.values(), ids=KINDS)
def test_a_broker_ends_with_its_program_even_if_that_is_killed(line: str) -> None:
    done = subprocess.run([sys.executable, "-c", STARTS_AND_DIES, line], capture_output=True, text=True, timeout=180)

    assert done.returncode == -signal.SIGKILL, done.stderr
    wait_until(lambda: ask_version(done.stdout.strip()) is None)


@pytest.mark.parametrize("line", KINDS.values(), ids=KINDS)
def test_a_broker_of_ones_own_ends_in_order_however_often_its_program_is_told_to(line: str) -> None:
    command = [sys.executable, "-m", "tests.servers", "--line", line]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        assert program.stderr is not None
        program.stdout.readline()
        url = program.stdout.readline().strip().removeprefix("EVENTBUS_URL=")
        deadline = time.monotonic() + 60
        while program.poll() is None and time.monotonic() < deadline:
            program.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                program.wait(0.005)  # often enough to meet it in the middle of ending

        assert (program.returncode, program.stderr.read()) == (0, "")
    assert ask_version(url) is None


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "10 s have passed"
        time.sleep(0.05)
