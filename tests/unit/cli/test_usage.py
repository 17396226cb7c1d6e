"""What can be known to be wrong before any broker is asked: one line that names it, and the right exit code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.cli.conftest import HELLO, Eventbus

NOBODY = "amqp://127.0.0.1:1/"  # asking it would take 15 s, and end with exit code 1
GOOD = '{"name": "a", "times": 1}'


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["greeted", "{"], "no JSON"),
        (["greeted", '{"name": 5, "times": 1}'], "name: string_type"),
        (["greeted.v2", '{"name": "a"}'], "times: missing"),
        (["greeted.v3", "{}"], "no event 'greeted' v3 in the catalogue (known: v1, v2)"),
        (["greted", "{}"], "no event 'greted' in the catalogue: did you mean 'greeted'?"),
        (["unheard_of", "{}"], "no event 'unheard_of' in the catalogue: there are greeted"),
        (["greeted", GOOD, "--delay", "soon"], "500ms, 10s, 5m, 2h or 1d"),
        (["greeted", GOOD, "--delay", "60d"], "42 days at most"),
        (["greeted", GOOD, "--delay", "1s", "--require-subscriber"], "exclude each other"),
        (["greeted", GOOD, "--source", "a b"], "'source' is no URI reference"),
        (["greeted", GOOD, "--id", ""], "'id' is empty"),
    ],
)
def test_an_event_that_cannot_be_published_is_wrong_usage(words: list[str], said: str, eventbus: Eventbus) -> None:
    ended = eventbus("publish", *words, "--schemas", "hello", "--url", NOBODY)

    assert (ended.code, ended.out) == (2, "")
    assert said in ended.error


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["greeted", "{}"], "give name and version, like order_placed.v1"),
        (["Greeted.v1", "{}"], "'Greeted.v1' is no event's type"),
        (["greeted.v1", '{"secret": '], "line 1 column 12"),
        (["greeted.v1", "[NaN]"], "NaN is no number in JSON"),
        (["greeted.v1", "{}", "--schemas", "nosuch"], "there is no module 'nosuch'"),
    ],
)
def test_data_without_a_class_must_at_least_be_json_with_a_type(
    words: list[str], said: str, eventbus: Eventbus
) -> None:
    ended = eventbus("publish", *words, "--url", NOBODY)

    assert (ended.code, ended.out) == (2, "")
    assert said in ended.error
    assert "secret" not in ended.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tail", "order_*"], "AMQP cannot match a part of a word"),
        (["tail", "--limit", "0"], "--limit"),
        (["run", "hello:greter"], "did you mean 'hello:greeter'?"),
        (["run", "hello", "--grace", "-1"], "--grace"),
        (["run", "hello", "--log", "xml"], "'console', 'json'"),
        (["run"], "MODULE:SERVICE"),
        (["dead", "replay", "greeter"], "Name IDs, --reason, --handler or --all"),
        (["dead", "replay", "greeter", "0123", "--all"], "--all and IDs exclude each other"),
        (["dead", "replay", "greeter", "--reason", "hunger", "--yes"], "rejected, exhausted, invalid-envelope"),
        (["topology", "remove", "greeter"], "add --yes"),
        (["undeliverable", "replay"], "Name IDs, --target or --all"),
        (["undeliverable", "replay", "0123", "--all"], "--all excludes IDs and --target"),
        (["runn", "hello"], "Did you mean 'run'?"),
        (["demo", "--sabotage", "everything"], "'lose', 'twice'"),
    ],
)
def test_what_cannot_be_meant_is_wrong_usage(words: list[str], said: str, eventbus: Eventbus) -> None:
    ended = eventbus(*words, *(["--url", NOBODY] if words[0] in ("tail", "run", "dead") else []))

    assert (ended.code, ended.out) == (2, "")
    assert said in ended.error


@pytest.mark.parametrize(
    "words",
    [
        ["publish", "greeted.v1", "{}"],
        ["tail"],
        ["topology", "apply", "hello"],
        ["topology", "verify", "hello"],
        ["topology", "remove", "greeter", "--yes"],
        ["dead", "list", "greeter"],
        ["dead", "show", "greeter", "0123456789ab"],
        ["dead", "replay", "greeter", "--all", "--yes"],
        ["undeliverable", "list"],
        ["undeliverable", "show", "0123456789ab"],
        ["undeliverable", "replay", "--all", "--yes"],
    ],
)
def test_commands_that_talk_to_other_processes_refuse_the_embedded_broker(words: list[str], eventbus: Eventbus) -> None:
    embedded, nowhere = eventbus(*words, "--url", "memory://"), eventbus(*words)

    assert embedded.code == nowhere.code == 1
    assert "memory:// lives inside one process" in embedded.error
    assert "give --url amqp://USER:PASSWORD@HOST/, or set EVENTBUS_URL" in nowhere.error


def test_run_without_a_broker_says_how_to_name_one(eventbus: Eventbus) -> None:
    ended = eventbus("run", "hello")

    assert ended.code == 1
    assert "EVENTBUS_URL" in ended.error


@pytest.mark.parametrize("url", ["amqp:/127.0.0.1", "http://127.0.0.1/", "amqp://u:sesame@127.0.0.1:port/"])
def test_a_wrong_url_is_one_line_without_its_password(url: str, eventbus: Eventbus) -> None:
    ended = eventbus("tail", "--url", url)

    assert ended.code == 1
    assert "amqp" in ended.error
    assert "sesame" not in ended.err


def test_mistakes_in_subscriptions_are_a_line_each_with_their_place(hello: Path, eventbus: Eventbus) -> None:
    (hello / "hello.py").write_text(
        HELLO
        + "\n@greeter.on('order_*')\nasync def a(event: Greeted): ..."
        + "\n@greeter.on('greeted')\ndef b(event: Greeted): ...\n"
    )

    for words in (["run", "hello", "--url", "memory://"], ["topology", "show", "hello"]):
        ended = eventbus(*words)

        first, second = ended.err.splitlines()
        assert ended.code == 1
        assert first.startswith(f"error: {hello / 'hello.py'}:")
        assert "'order_*'" in first
        assert "async def" in second
        assert ended.out == ""


def test_mistakes_in_the_environment_are_a_line_each(hello: Path, eventbus: Eventbus) -> None:
    (hello / ".env").write_text("EVENTBUS_LOG=xml\nEVENTBUS_DECLARE=perhaps\n")

    ended = eventbus("version")

    assert ended.code == 1
    assert [line.split()[:2] for line in ended.err.splitlines()] == [
        ["error:", "EVENTBUS_DECLARE"],
        ["error:", "EVENTBUS_LOG"],
    ]


COMMANDS = [
    ["run"],
    ["demo"],
    ["publish"],
    ["tail"],
    ["topology", "show"],
    ["topology", "apply"],
    ["topology", "verify"],
    ["topology", "remove"],
    ["dead", "list"],
    ["dead", "show"],
    ["dead", "replay"],
    ["undeliverable", "list"],
    ["undeliverable", "show"],
    ["undeliverable", "replay"],
    ["version"],
]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_has_help_with_an_example(
    words: list[str], eventbus: Eventbus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")

    ended = eventbus(*words, "--help")

    assert (ended.code, ended.err) == (0, "")
    assert f"Usage: eventbus {' '.join(words)} " in ended.out
    assert f"Example: eventbus {' '.join(words)}" in ended.out


def test_the_help_lists_every_command_and_the_exit_codes(eventbus: Eventbus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")

    ended = eventbus("--help")

    for word in {words[0] for words in COMMANDS} | {"--debug", "EVENTBUS_", ".env", "3 found problems"}:
        assert word in ended.out


@pytest.mark.parametrize("words", [[], ["topology"], ["dead"], ["undeliverable"]], ids=" ".join)
def test_a_group_alone_shows_what_it_has(words: list[str], eventbus: Eventbus) -> None:
    ended = eventbus(*words)

    assert (ended.code, ended.err) == (2, "")
    assert "Commands" in ended.out


def test_version_as_an_option_is_one_line(eventbus: Eventbus) -> None:
    ended = eventbus("--version")

    assert (ended.code, ended.err) == (0, "")
    assert ended.out.split()[0] == "eventbus"
    assert len(ended.out.splitlines()) == 1


def test_version_without_a_broker_is_what_is_installed(eventbus: Eventbus) -> None:
    ended = eventbus("version")

    assert ended.code == 0
    assert [line.split()[0] for line in ended.out.splitlines()] == ["eventbus", "python", "aio-pika"]


def test_the_program_begins_without_what_only_some_commands_need() -> None:
    heavy = ["pydantic", "opentelemetry", "asyncio", "rich.console", "aio_pika", "eventbus.worker", "watchfiles"]
    code = f"import eventbus.cli, sys; print([name for name in {heavy} if name in sys.modules])"

    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout

    assert loaded == "[]\n"
