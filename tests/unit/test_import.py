"""`import eventbus` is cheap: no driver, no web framework, no command line library, whatever of it is used."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import eventbus

# Drivers, frameworks and stores: what only a user of that part of the bus pays for.
HEAVY = {
    *("aio_pika", "aiormq", "pamqp", "redis", "sqlalchemy", "asyncpg", "aiosqlite"),
    *("fastapi", "starlette", "uvicorn", "httpx", "requests", "http.server"),
    *("typer", "click", "rich", "watchfiles"),
    *("opentelemetry.sdk", "opentelemetry.exporter", "cloudevents", "pythonjsonlogger"),
}


def loaded_by(code: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys, json; print(json.dumps(sorted(sys.modules)))"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return set(json.loads(done.stdout))


def test_importing_the_package_loads_no_driver_no_framework_and_no_command_line() -> None:
    assert loaded_by("import eventbus") & HEAVY == set()


def test_using_every_public_name_loads_none_either() -> None:
    assert loaded_by("from eventbus import *; assert Bus and Worker and Service") & HEAVY == set()


def test_the_embedded_broker_loads_none_either() -> None:
    assert loaded_by("import eventbus.transport; eventbus.transport.from_url('memory://')") & HEAVY == set()


def test_the_memory_store_loads_none_either() -> None:
    assert loaded_by("import eventbus.idempotency; eventbus.idempotency.from_url('memory://')") & HEAVY == set()


def test_a_shared_store_loads_its_own_driver_only() -> None:
    by_redis = loaded_by("import eventbus.idempotency; eventbus.idempotency.from_url('redis://localhost/')")
    by_sqlite = loaded_by("import eventbus.idempotency; eventbus.idempotency.from_url('sqlite:///x.db')")

    assert by_redis & {"redis", "sqlalchemy"} == {"redis"}
    assert by_sqlite & {"redis", "sqlalchemy", "aiosqlite", "asyncpg"} == {"sqlalchemy", "aiosqlite"}


def test_a_connection_to_rabbitmq_would_be_noticed() -> None:
    assert "aio_pika" in loaded_by("import eventbus.transport; eventbus.transport.from_url('amqp://localhost/')")


def test_what_is_loaded_on_demand_is_what_type_checkers_are_told() -> None:
    told = {
        (alias.name, str(node.module).removeprefix("eventbus."))
        for node in ast.walk(ast.parse(Path(eventbus.__file__).read_text()))
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("eventbus.")
        for alias in node.names
    }

    assert told == set(eventbus._HOME.items())
    assert {name for name, _ in told} == set(eventbus.__all__)


def test_whoever_lacks_sqlalchemy_is_told_what_to_install() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import sys; sys.modules['sqlalchemy'] = None; import eventbus.outbox"],
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert "SetupError: a database needs sqlalchemy: pip install 'eventbus[sql]'" in done.stderr
