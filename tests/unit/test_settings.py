"""What the environment says, and what it cannot say."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError

from eventbus.errors import SetupError
from eventbus.settings import Settings

Setenv = Callable[..., None]


@pytest.fixture(autouse=True)
def setenv(monkeypatch: pytest.MonkeyPatch) -> Setenv:
    """Variables for this test alone, on top of none."""
    for name in [name for name in os.environ if name.upper().startswith("EVENTBUS_")]:
        monkeypatch.delenv(name)

    def set_all(**variables: str) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_all


def test_an_empty_environment_gives_the_defaults() -> None:
    assert Settings.load() == Settings(
        url=None,
        namespace="events",
        source=None,
        idempotency="memory://",
        declare="apply",
        lane="on",
        max_message_bytes=None,
        management_url=None,
        log=None,
        log_level="info",
    )


def test_every_setting_has_its_variable(setenv: Setenv) -> None:
    setenv(
        EVENTBUS_URL="amqp://u:p@host/",
        EVENTBUS_NAMESPACE="shop",
        EVENTBUS_SOURCE="/shop",
        EVENTBUS_IDEMPOTENCY="redis://:p@host/0",
        EVENTBUS_DATABASE="postgresql://u:p@host/d",
        EVENTBUS_DECLARE="Verify",
        EVENTBUS_LANE="Off",
        EVENTBUS_MAX_MESSAGE_BYTES="1000",
        EVENTBUS_MANAGEMENT_URL="http://u:p@host:15672/",
        EVENTBUS_LOG="JSON",
        EVENTBUS_LOG_LEVEL="DEBUG",
    )

    assert Settings.load().model_dump() == {
        "url": "amqp://u:p@host/",
        "namespace": "shop",
        "source": "/shop",
        "idempotency": "redis://:p@host/0",
        "database": "postgresql://u:p@host/d",
        "declare": "verify",
        "lane": "off",
        "max_message_bytes": 1000,
        "management_url": "http://u:p@host:15672/",
        "log": "json",
        "log_level": "debug",
    }
    assert len(Settings.model_fields) == 11


def test_the_environment_is_read_anew_each_time(setenv: Setenv) -> None:
    setenv(EVENTBUS_NAMESPACE="one")
    one = Settings.load()
    setenv(EVENTBUS_NAMESPACE="two")

    assert (one.namespace, Settings.load().namespace) == ("one", "two")


def test_an_empty_variable_counts_as_none(setenv: Setenv) -> None:
    setenv(EVENTBUS_URL="", EVENTBUS_NAMESPACE="", EVENTBUS_DECLARE="")

    assert Settings.load() == Settings()


def test_the_environment_wins_over_the_dotenv_file(setenv: Setenv, tmp_path: Path) -> None:
    dotenv = tmp_path / ".env"
    dotenv.write_text("EVENTBUS_URL=memory://file\nEVENTBUS_NAMESPACE=file\nOTHER=1\nEVENTBUS_OTHER=2\n")
    setenv(EVENTBUS_NAMESPACE="environment")

    settings = Settings.load(dotenv)

    assert (settings.url, settings.namespace) == ("memory://file", "environment")


def test_a_dotenv_file_is_read_only_when_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("EVENTBUS_NAMESPACE=file\n")
    monkeypatch.chdir(tmp_path)

    assert Settings.load().namespace == "events"
    assert Settings.load(tmp_path / "missing").namespace == "events"


def test_a_dotenv_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    dotenv = tmp_path / ".env"
    dotenv.write_bytes(b"EVENTBUS_URL=\xff\xfe")

    with pytest.raises(SetupError, match=r"\.env cannot be read"):
        Settings.load(dotenv)


def test_kubernetes_variables_for_a_service_called_eventbus_are_left_alone(setenv: Setenv) -> None:
    setenv(EVENTBUS_PORT="tcp://10.0.0.1:5672", EVENTBUS_SERVICE_HOST="10.0.0.1")

    assert Settings.load() == Settings()


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("EVENTBUS_NAMESPACE", "My Events", "is 'My Events': give lower-case letters"),
        ("EVENTBUS_SOURCE", "my shop", "is 'my shop': give an URI reference"),
        ("EVENTBUS_DECLARE", "always", "is 'always': give apply, verify or never"),
        ("EVENTBUS_MAX_MESSAGE_BYTES", "0", "is '0': give a whole number"),
        ("EVENTBUS_MAX_MESSAGE_BYTES", "16MiB", "is '16MiB': give a whole number"),
        ("EVENTBUS_LOG", "xml", "is 'xml': give console or json"),
        ("EVENTBUS_LOG_LEVEL", "loud", "is 'loud': give debug, info, warning or error"),
        ("EVENTBUS_URL", "localhost", "is no URL: give an URL, like amqp://"),
        ("EVENTBUS_IDEMPOTENCY", "memory", "is no URL: give an URL, like memory://"),
    ],
)
def test_a_mistake_names_the_variable_and_the_remedy(setenv: Setenv, variable: str, value: str, said: str) -> None:
    setenv(**{variable: value})

    with pytest.raises(SetupError) as caught:
        Settings.load()

    assert str(caught.value).startswith(f"{variable} {said}")


def test_all_mistakes_are_told_one_a_line(setenv: Setenv) -> None:
    setenv(EVENTBUS_URL="x", EVENTBUS_LOG="x", EVENTBUS_DECLARE="x")

    with pytest.raises(SetupError) as caught:
        Settings.load()

    assert [line.split()[0] for line in str(caught.value).splitlines()] == [
        "EVENTBUS_URL",
        "EVENTBUS_DECLARE",
        "EVENTBUS_LOG",
    ]


def test_a_password_is_shown_nowhere(setenv: Setenv) -> None:
    setenv(EVENTBUS_URL="amqp:/user:hunter2@host", EVENTBUS_IDEMPOTENCY="redis:/:hunter2@host")

    with pytest.raises(SetupError) as caught:
        Settings.load()

    assert "hunter2" not in str(caught.value)
    assert caught.value.__suppress_context__
    setenv(EVENTBUS_URL="amqp://user:hunter2@host", EVENTBUS_IDEMPOTENCY="redis://:hunter2@host")
    assert "hunter2" not in repr(Settings.load())


def test_settings_do_not_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Settings().namespace = "other"  # type: ignore[misc]


def test_importing_settings_loads_no_reader_of_the_environment() -> None:
    code = "import sys, eventbus.settings; sys.exit('pydantic_settings' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
