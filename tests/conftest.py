"""What tests ask for: brokers by fixture, and the line of the report that says which ones they got.

    broker                  the RabbitMQ of this session, shared
    rabbitmq_url            a fresh virtual host on it
    every_line              one test per broker line that this machine has, each with that line's shared broker;
                            the default line only, unless `--all-lines` is given (`make test-all`)
    own_broker              a RabbitMQ that the test may stop and kill
    own_broker_of_every_line
    sqlite_url, postgresql_url  an empty database, without tables
    redis_url               an empty Redis
    shared_store_url        one test for each idempotency store that workers can share: empty, with its tables
    own_store               gives a `postgresql` or `redis` that the test may kill

Virtual hosts, databases and own servers are cleared up, or started again, after each test.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any  # Any: a worker as pytest-xdist hands it over, which is there only if that is installed

import pytest
from hypothesis import HealthCheck, settings

from tests.servers import LINES, Brokers, BrokerServer, find_lines, find_own_lines, lines_to_test
from tests.stores import Stores, StoreServer, apart, make_tables

# How long an example takes says how busy the machine is, not whether the code is right.
settings.register_profile("eventbus", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("eventbus")

BROKERS = pytest.StashKey[Brokers]()
STORES = pytest.StashKey[Stores]()
STARTED = pytest.StashKey[set[tuple[str, str]]]()  # line and origin of each broker that this report is about
REMARKS = pytest.StashKey[dict[str, None]]()  # lines for the end of the report, each once, as they come
SHARED_STORES = ("sqlite", "postgresql", "redis")
EVERY_LINE = {"every_line": find_lines, "own_broker_of_every_line": find_own_lines}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all-lines", action="store_true", help="test every RabbitMQ line that this machine has")


def pytest_configure(config: pytest.Config) -> None:
    # In the background of a script SIGINT is ignored, and a program that a test interrupts would have that from us.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    config.stash[BROKERS] = Brokers()
    config.stash[STORES] = Stores()
    config.stash[STARTED] = set()
    config.stash[REMARKS] = {}


def pytest_sessionfinish(session: pytest.Session) -> None:
    stash = session.config.stash
    brokers, started, remarks = stash[BROKERS], stash[STARTED], stash[REMARKS]
    started.update((server.line, server.origin) for server in brokers.started())
    remarks.update({f"database: {server.origin}": None for server in stash[STORES].started()})
    # Here and not later: a worker that says it has finished is given ten seconds to be gone.
    brokers.close()
    stash[STORES].close()
    output = getattr(session.config, "workeroutput", None)  # only where pytest-xdist started us
    if output is not None:
        output["started"] = sorted(started)
        output["remarks"] = list(remarks)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take over what a worker of pytest-xdist has to report: it ran tests, and has no terminal."""
    output = getattr(node, "workeroutput", {"started": [], "remarks": []})  # a worker that crashed has none
    node.config.stash[STARTED].update(output["started"])
    node.config.stash[REMARKS].update(dict.fromkeys(output["remarks"]))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for fixture, lines in EVERY_LINE.items():
        if fixture in metafunc.fixturenames:
            metafunc.parametrize(fixture, lines_to_test(lines(), metafunc.config), indirect=True)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    started = config.stash[STARTED]
    if started:
        tested = {line for line, _ in started}
        missing = [line for line in LINES if line not in find_lines()]
        left_out = [line for line in find_lines() if line not in tested]
        terminalreporter.write_line(f"brokers: {'; '.join(sorted({origin for _, origin in started}))}")
        if left_out:
            terminalreporter.write_line(
                f"broker lines that are here, but were not tested (make test-all does): {left_out}"
            )
        if missing:
            terminalreporter.write_line(f"broker lines that were not tested, since they are not here: {missing}")
    for remark in config.stash[REMARKS]:
        terminalreporter.write_line(remark)


@pytest.fixture(scope="session")
def brokers(pytestconfig: pytest.Config) -> Brokers:
    """All of them, by line."""
    return pytestconfig.stash[BROKERS]


@pytest.fixture
def broker(brokers: Brokers) -> Iterator[BrokerServer]:
    """The RabbitMQ of this session; other tests use it too, so use `new_vhost` and break nothing."""
    server = brokers.shared()
    yield server
    server.drop_vhosts()


@pytest.fixture
def rabbitmq_url(broker: BrokerServer) -> str:
    """The URL of a fresh virtual host on a real RabbitMQ."""
    return broker.new_vhost()


@pytest.fixture
def every_line(brokers: Brokers, request: pytest.FixtureRequest) -> Iterator[BrokerServer]:
    """The shared RabbitMQ of each line that this machine has, one after the other."""
    server = brokers.shared(request.param)
    yield server
    server.drop_vhosts()


@pytest.fixture
def own_broker(brokers: Brokers) -> Iterator[BrokerServer]:
    """A RabbitMQ that the test may stop, kill and start."""
    yield from _lent(brokers, None)


@pytest.fixture
def own_broker_of_every_line(brokers: Brokers, request: pytest.FixtureRequest) -> Iterator[BrokerServer]:
    """As `own_broker`, one after the other for each line that this machine has."""
    yield from _lent(brokers, request.param)


def _lent(brokers: Brokers, line: str | None) -> Iterator[BrokerServer]:
    yield (server := brokers.own(line))
    if not server.is_running:
        server.start()
    server.drop_vhosts()


@pytest.fixture(scope="session")
def stores(pytestconfig: pytest.Config) -> Stores:
    """The databases, by their names."""
    return pytestconfig.stash[STORES]


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """The URL of a file that is not there yet."""
    return f"sqlite:///{tmp_path / 'test.db'}"


@pytest.fixture
def postgresql_url(stores: Stores) -> Iterator[str]:
    """The URL of an empty database."""
    server = stores.shared("postgresql")
    yield server.new_url()
    server.drop()


@pytest.fixture
def redis_url(stores: Stores) -> str:
    """The URL of an empty database of a Redis."""
    return stores.shared("redis").new_url()


@pytest.fixture(params=SHARED_STORES)
def shared_store_url(request: pytest.FixtureRequest) -> str:
    """The URL of each shared idempotency store, one after the other: empty, with its tables."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    apart(make_tables(url))
    return url


@pytest.fixture
def own_store(stores: Stores) -> Iterator[Callable[[str], StoreServer]]:
    """Gives the `postgresql` or the `redis` that the test may kill and start."""
    lent: list[StoreServer] = []

    def lend(name: str) -> StoreServer:
        lent.append(stores.own(name))
        return lent[-1]

    yield lend
    for server in lent:
        if not server.is_running:
            server.start()
        server.drop()
