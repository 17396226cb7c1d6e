"""The `eventbus` program in processes of its own, on a real RabbitMQ: what it prints, and what it ends with."""

from __future__ import annotations

import json
import resource
import secrets
import signal
import subprocess
from pathlib import Path

import pytest

from tests.programs import EVENTBUS, Done, Program, environment, eventbus, on_a_terminal, running
from tests.servers import BrokerServer, vhost_of, with_login

# Handlers tell the tests what they did through files in the working directory.
HELLO = """
import asyncio, logging, pathlib
from datetime import timedelta

from eventbus import Context, Event, Reject, Retry, Service

log = logging.getLogger("hello")


class Greeted(Event, name="greeted", version=1):
    name: str
    times: int = 1


class GreetedNew(Event, name="greeted", version=2):
    name: str
    times: int


class Left(Event, name="people.left"):
    name: str


greeter = Service("greeter", retry=Retry(attempts=2, delay=timedelta(milliseconds=100)))


@greeter.on("greeted", timeout=timedelta(seconds=90))
async def greet(event: Greeted | GreetedNew, context: Context) -> None:
    log.info("greeting", extra={"times": event.times})
    say(f"began {event.name}")
    if event.name == "slow":
        await asyncio.sleep(1)
    if event.name == "stuck":
        await asyncio.sleep(80)
    if event.name == "rude":
        raise Reject("we do not greet the rude")
    if event.name == "broken" and not pathlib.Path("mended").exists():
        raise ValueError("the greeting card is torn")
    say(f"greeted {event.name} {event.times}")


@greeter.on("people.left", name="goodbye")
async def wave(event: Left) -> None:
    say(f"waved {event.name}")


def say(what):
    print(what, flush=True)
"""


@pytest.fixture
def hello(tmp_path: Path) -> Path:
    """A working directory with the module `hello`."""
    (tmp_path / "hello.py").write_text(HELLO)
    return tmp_path


def publish(hello: Path, url: str, type: str, *more: str, **data: object) -> Done:
    done = eventbus("publish", type, json.dumps(data), "--schemas", "hello", "--url", url, *more, cwd=hello)
    assert done.code == 0, done.err
    return done


def dead_letters(hello: Path, url: str) -> list[dict[str, object]]:
    found: list[dict[str, object]] = eventbus("dead", "list", "greeter", "--json", "--url", url, cwd=hello).json
    return found


# ── run ─────────────────────────────────────────────────────────────────────────────────────────────


def test_run_prints_what_it_runs_and_handles_what_is_published(broker: BrokerServer, hello: Path) -> None:
    url = broker.new_vhost()

    with running("run", "hello:greeter", "--url", url, cwd=hello, wait_for="ready") as worker:
        publish(hello, url, "greeted", name="ann", times=3)
        worker.wait_for("greeted ann 3")
        done = worker.end()

    said = done.out.splitlines()
    assert said[0].startswith(f"broker   RabbitMQ {broker.version} at ")
    assert said[0].endswith("namespace events")
    assert said[1].startswith("service  greeter")
    assert "greet" in said[2]
    for fact in ("greeted.v1 | greeted.v2", "2 attempts", "timeout 90 s"):
        assert fact in said[2]
    assert "goodbye" in said[3]
    assert "people.left.v1" in said[3]
    assert said[4] == "idempotency  memory://"
    assert said[5] == "ready"
    assert done.code == 0


def test_sigterm_lets_the_handler_at_work_finish(rabbitmq_url: str, hello: Path) -> None:
    with running("run", "hello", "--url", rabbitmq_url, cwd=hello, wait_for="ready") as worker:
        publish(hello, rabbitmq_url, "greeted", name="slow", times=1)
        worker.wait_for("began slow")
        done = worker.end(signal.SIGTERM)

    assert "greeted slow 1" in done.out
    assert done.code == 0
    with running("run", "hello", "--url", rabbitmq_url, cwd=hello, wait_for="ready") as worker:
        publish(hello, rabbitmq_url, "greeted", name="next", times=1)
        worker.wait_for("greeted next")
        assert "slow" not in worker.out


def test_a_second_signal_hands_the_event_back_at_once(rabbitmq_url: str, hello: Path) -> None:
    with running("run", "hello", "--url", rabbitmq_url, cwd=hello, wait_for="ready") as worker:
        publish(hello, rabbitmq_url, "greeted", name="stuck", times=1)
        worker.wait_for("began stuck")
        worker.send(signal.SIGTERM)
        worker.wait_for("stopping: waiting for handlers at work")
        done = worker.end(signal.SIGTERM)

    assert "stopping now" in done.out
    assert done.code == 0
    with running("run", "hello", "--url", rabbitmq_url, cwd=hello, wait_for="ready") as other:
        other.wait_for("began stuck")


def test_the_grace_period_ends_a_handler_that_does_not(rabbitmq_url: str, hello: Path) -> None:
    with running("run", "hello", "--url", rabbitmq_url, "--grace", "0.2", cwd=hello, wait_for="ready") as worker:
        publish(hello, rabbitmq_url, "greeted", name="stuck", times=1)
        worker.wait_for("began stuck")
        done = worker.end()

    assert "the grace period ended" in done.err
    assert done.code == 0


def test_run_needs_no_other_process_on_the_embedded_broker(hello: Path) -> None:
    with running("run", "hello", "--url", "memory://", cwd=hello, wait_for="ready") as worker:
        assert "broker   embedded" in worker.out
        assert worker.end(signal.SIGINT).code == 0


def test_json_logs_carry_the_event_and_never_its_data(rabbitmq_url: str, hello: Path) -> None:
    words = ("run", "hello", "--url", rabbitmq_url, "--log", "json")
    with running(*words, cwd=hello, wait_for="ready") as worker:
        sent = publish(hello, rabbitmq_url, "greeted", "--subject", "card", name="rude", times=77123)
        worker.wait_for("gave up")
        done = worker.end()

    records = [json.loads(line) for line in done.err.splitlines()]
    gave_up = next(record for record in records if "gave up" in record["message"])
    assert gave_up["event_id"] == sent.out.strip()
    assert gave_up["event_type"] == "greeted.v2"
    assert (gave_up["handler"], gave_up["attempt"], gave_up["level"]) == ("greet", 1, "ERROR")
    assert gave_up["time"].endswith("+00:00")
    own = next(record for record in records if record["logger"] == "hello")
    assert (own["message"], own["times"]) == ("greeting", 77123)
    assert "77123" not in "".join(json.dumps(record) for record in records if record is not own)


def test_console_logs_are_lines_with_what_they_carry_behind_them(rabbitmq_url: str, hello: Path) -> None:
    words = ("run", "hello", "--url", rabbitmq_url, "--log", "console", "--log-level", "warning")
    with running(*words, cwd=hello, wait_for="ready") as worker:
        sent = publish(hello, rabbitmq_url, "greeted", name="rude", times=1)
        worker.wait_for("gave up")
        done = worker.end()

    line = next(line for line in done.err.splitlines() if "gave up" in line)
    assert " ERROR   eventbus.delivery  greeter.greet greeted.v2, attempt 1: gave up" in line
    assert f"  event_id={sent.out.strip()}" in line
    assert "\x1b" not in done.err
    assert "greeting" not in done.err  # an info


def test_otel_variables_are_honoured(rabbitmq_url: str, hello: Path) -> None:
    words = ("run", "hello", "--url", rabbitmq_url)
    with running(*words, cwd=hello, wait_for="ready", OTEL_TRACES_EXPORTER="console") as worker:
        publish(hello, rabbitmq_url, "greeted", name="ann", times=1)
        worker.wait_for("greeted ann")
        done = worker.end()

    assert '"name": "process events:greeted.v2:events.greeter"' in done.out
    assert '"service.name": "greeter"' in done.out
    own = next(json.loads(line) for line in done.err.splitlines() if '"hello"' in line)
    assert len(own["trace_id"]) == 32  # a handler's own lines belong to its trace


def test_reload_starts_again_with_a_change_and_after_a_mistake_is_mended(hello: Path) -> None:
    module = hello / "hello.py"
    with running("run", "hello", "--url", "memory://", "--reload", cwd=hello, wait_for="ready") as worker:
        change_until(worker, module, HELLO.replace('name="goodbye"', 'name="adieu"'), "adieu")
        change_until(worker, module, HELLO + "\nprint(undefined)\n", "ended with exit code 1: waiting for a change")
        worker.wait_for(f"error: hello cannot be imported: NameError: name 'undefined' is not defined ({module}:")
        change_until(worker, module, HELLO.replace('name="goodbye"', 'name="farewell"'), "farewell")
        worker.wait_for("ready", times=3)
        done = worker.end(signal.SIGTERM)

    assert done.code == 0
    assert "hello.py changed: starting again" in done.err


def change_until(worker: Program, module: Path, text: str, said: str) -> None:
    assert said not in worker.out + worker.err
    module.write_text(text)
    worker.wait_for(said)


# ── publish ─────────────────────────────────────────────────────────────────────────────────────────


def test_publish_prints_the_id_that_its_subscriber_gets(rabbitmq_url: str, hello: Path) -> None:
    with running("run", "hello", "--url", rabbitmq_url, cwd=hello, wait_for="ready") as worker:
        assert publish(hello, rabbitmq_url, "greeted.v1", "--id", "g-1", name="ann").out == "g-1\n"
        worker.wait_for("greeted ann 1")  # the class's default was filled in

        publish(hello, rabbitmq_url, "greeted.v1", "--id", "g-1", name="ann")
        publish(hello, rabbitmq_url, "people.left", name="bob")
        worker.wait_for("waved bob")
        publish(hello, rabbitmq_url, "greeted.v1", "--id", "g-2", "--delay", "300ms", name="ann")
        worker.wait_for("greeted ann 1", times=2)
        assert worker.out.count("greeted ann") == 2  # g-1 twice is a duplicate


def test_publish_as_json_is_the_cloud_event(rabbitmq_url: str, hello: Path) -> None:
    sent = publish(
        hello, rabbitmq_url, "greeted", "--json", "--subject", "s", "--source", "/me", name="ä", times=2
    ).json

    assert sent.pop("id")
    assert sent.pop("time").endswith("Z")
    assert sent == {
        "specversion": "1.0",
        "source": "/me",
        "type": "greeted.v2",
        "subject": "s",
        "datacontenttype": "application/json",
        "data": {"name": "ä", "times": 2},
    }


def test_publish_reads_stdin_and_without_schemas_changes_nothing(rabbitmq_url: str, hello: Path) -> None:
    with running("run", "hello", "--url", rabbitmq_url, cwd=hello, wait_for="ready") as worker:
        data = '{"name": "eve", "unknown": 12345678901234567.89}\n'
        done = eventbus("publish", "greeted.v1", "-", "--url", rabbitmq_url, cwd=hello, stdin=data)
        assert done.code == 0, done.err
        worker.wait_for("greeted eve 1")


def test_an_event_that_nobody_wants_is_fine_unless_a_subscriber_is_required(rabbitmq_url: str, hello: Path) -> None:
    words = ("publish", "nobody.v1", "{}", "--url", rabbitmq_url)

    assert eventbus(*words, cwd=hello).code == 0
    done = eventbus(*words, "--require-subscriber", cwd=hello)

    assert done.code == 1
    assert done.out == ""
    assert "no queue is bound for nobody.v1" in done.error


# ── tail ────────────────────────────────────────────────────────────────────────────────────────────


def test_tail_shows_what_is_published_a_line_each(rabbitmq_url: str, hello: Path) -> None:
    with running("tail", "--url", rabbitmq_url, "--limit", "2", cwd=hello, wait_for="until Ctrl-C") as tail:
        publish(hello, rabbitmq_url, "greeted", "--subject", "card", "--id", "g-1", name="ann", times=1)
        publish(hello, rabbitmq_url, "people.left", "--id", "l-1", name="bob")
        done = tail.end(None)

    first, second = done.out.splitlines()
    assert first.split()[1:] == ["greeted.v2", "g-1", "/programs/eventbus", "card"]
    assert second.split()[1:] == ["people.left.v1", "l-1", "/programs/eventbus"]
    assert done.code == 0
    assert "ann" not in done.out  # an event's data are shown to whoever asks for them


def test_tail_shows_only_what_the_pattern_names(rabbitmq_url: str, hello: Path) -> None:
    words = ("tail", "greeted", "--url", rabbitmq_url, "--json", "--data", "--limit", "2")
    with running(*words, cwd=hello, wait_for="until Ctrl-C") as tail:
        publish(hello, rabbitmq_url, "greeted.v1", name="ann")
        publish(hello, rabbitmq_url, "people.left", name="bob")
        publish(hello, rabbitmq_url, "greeted.v2", name="eve", times=2)
        done = tail.end(None)

    events = [json.loads(line) for line in done.out.splitlines()]
    assert [(event["type"], event["data"]["name"]) for event in events] == [
        ("greeted.v1", "ann"),
        ("greeted.v2", "eve"),
    ]


def test_ctrl_c_ends_a_tail_quietly_and_its_queue_with_it(broker: BrokerServer, hello: Path) -> None:
    url = broker.new_vhost()
    with running("tail", "--url", url, cwd=hello, wait_for="until Ctrl-C") as tail:
        during = queues(broker, url)
        done = tail.end(signal.SIGINT)

    assert done.code == 130
    assert done.err.splitlines()[1:] == []
    assert [name for name in during if name.startswith("events.tail.")]
    assert [name for name in queues(broker, url) if name.startswith("events.tail.")] == []


def queues(broker: BrokerServer, url: str) -> list[str]:
    found: list[dict[str, str]] = json.loads(
        broker.ctl("--formatter", "json", "list_queues", "-p", vhost_of(url), "name")
    )
    return [row["name"] for row in found]


def test_a_reader_that_has_enough_ends_it_without_a_word(rabbitmq_url: str, hello: Path) -> None:
    process = subprocess.Popen(
        [EVENTBUS, "tail", "--url", rabbitmq_url, "--limit", "50"],
        cwd=hello,
        env=environment({}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stderr.readline()
    process.stdout.close()
    publish(hello, rabbitmq_url, "people.left", name="bob")

    assert process.wait(60) == 1
    assert process.stderr.read() == b""
    process.stderr.close()


# ── topology ────────────────────────────────────────────────────────────────────────────────────────


def test_what_is_published_after_apply_waits_for_the_worker(rabbitmq_url: str, hello: Path) -> None:
    done = eventbus("topology", "apply", "hello", "--url", rabbitmq_url, cwd=hello)
    assert (done.code, done.err) == (0, "")
    assert "declared events.greeter\n" in done.out
    publish(hello, rabbitmq_url, "greeted", "--require-subscriber", name="early", times=1)

    with running("run", "hello", "--url", rabbitmq_url, cwd=hello, wait_for="ready") as worker:
        worker.wait_for("greeted early 1")


def test_apply_waits_for_a_broker_that_is_starting(broker: BrokerServer, hello: Path) -> None:
    # What a starting broker does last of all is to learn its users: until then it refuses them.
    url = with_login(broker.new_vhost(), name := f"late-{secrets.token_hex(4)}", "secret")
    words = ("topology", "apply", "hello", "--url", url)
    impatient = eventbus(*words, cwd=hello)

    with running(*words, "--wait", "120", cwd=hello, wait_for="waiting for the broker") as apply:
        broker.api("PUT", f"/users/{name}", {"password": "secret", "tags": ""})
        broker.set_permissions(url)
        done = apply.end(None)

    assert impatient.code == 1
    assert done.code == 0, done.err
    assert "error" not in done.err


def test_topology_is_shown_to_people_as_a_tree(hello: Path) -> None:
    done = eventbus("topology", "show", "hello", cwd=hello)

    assert done.code == 0
    for fact in ("events.greeter.retry", "events  greeted.*", "(24 words).retry.greeter", "events.undeliverable"):
        assert fact in done.out
    assert "*.*" not in done.out


# ── dead letters ────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def with_dead_letters(rabbitmq_url: str, hello: Path) -> str:
    """The URL of a broker with two dead letters of `greeter`: rejected, and exhausted after two attempts."""
    with running("run", "hello", "--url", rabbitmq_url, cwd=hello, wait_for="ready") as worker:
        publish(hello, rabbitmq_url, "greeted", "--id", "g-rude", name="rude", times=1)
        worker.wait_for("gave up (rejected)")
        publish(hello, rabbitmq_url, "greeted", "--id", "g-broken", name="broken", times=1)
        worker.wait_for("gave up (exhausted)")
        worker.end()
    return rabbitmq_url


def test_dead_letters_are_listed_and_stay(with_dead_letters: str, hello: Path) -> None:
    url = with_dead_letters

    letters = dead_letters(hello, url)
    table = eventbus("dead", "list", "greeter", "--url", url, cwd=hello)

    assert [(x["event_id"], x["reason"], x["attempts"], x["handler"]) for x in letters] == [
        ("g-rude", "rejected", 1, "greet"),
        ("g-broken", "exhausted", 2, "greet"),
    ]
    assert letters == dead_letters(hello, url)
    assert table.code == 0
    assert "we do not greet the rude" in table.out
    assert "ValueError: the greeting card is torn" in table.out


def test_one_dead_letter_is_shown_with_all_that_is_known(with_dead_letters: str, hello: Path) -> None:
    url = with_dead_letters
    broken = str(dead_letters(hello, url)[1]["id"])

    for_people = eventbus("dead", "show", "greeter", broken, "--url", url, cwd=hello)
    for_scripts = eventbus("dead", "show", "greeter", broken, "--url", url, "--json", cwd=hello).json

    for fact in ("exhausted", "ValueError: the greeting card is torn", "hello.py", '"name":"broken"', "g-broken"):
        assert fact in for_people.out
    assert for_scripts["body"] == {"name": "broken", "times": 1}
    assert "hello.py" in for_scripts["trace"]
    assert for_scripts["headers"]["x-eventbus-reason"] == "exhausted"


def test_a_replayed_dead_letter_is_handled_and_gone(with_dead_letters: str, hello: Path) -> None:
    url = with_dead_letters
    (hello / "mended").touch()
    words = ("dead", "replay", "greeter", "--reason", "exhausted", "--handler", "greet", "--yes", "--json")

    with running("run", "hello", "--url", url, cwd=hello, wait_for="ready") as worker:
        done = eventbus(*words, "--url", url, cwd=hello)
        worker.wait_for("greeted broken 1")

    assert done.json == {"replayed": 1}
    assert [x["event_id"] for x in dead_letters(hello, url)] == ["g-rude"]


def test_replaying_many_needs_a_yes(with_dead_letters: str, hello: Path) -> None:
    url = with_dead_letters
    words = ("dead", "replay", "greeter", "--all", "--url", url)

    in_a_script = eventbus(*words, cwd=hello)
    refused = on_a_terminal(*words, cwd=hello, answers={"[y/N]": "n\n"})
    left = dead_letters(hello, url)
    agreed = on_a_terminal(*words, cwd=hello, answers={"[y/N]": "y\n"})

    assert in_a_script.code == 2
    assert "--yes" in in_a_script.error
    assert "Publish 2 dead letters of greeter again?" in refused.out
    assert (refused.code, len(left)) == (0, 2)
    assert "2 of greeter replayed" in agreed.out
    assert (agreed.code, dead_letters(hello, url)) == (0, [])


def test_ids_name_dead_letters_and_a_wrong_one_replays_none(with_dead_letters: str, hello: Path) -> None:
    url = with_dead_letters
    rude = str(dead_letters(hello, url)[0]["id"])

    wrong = eventbus("dead", "replay", "greeter", rude, "nosuchletter", "--url", url, cwd=hello)
    assert wrong.code == 1
    assert "nosuchletter" in wrong.error
    assert len(dead_letters(hello, url)) == 2

    right = eventbus("dead", "replay", "greeter", rude, "--url", url, cwd=hello)
    assert right.out == "1 of greeter replayed\n"
    assert [x["event_id"] for x in dead_letters(hello, url)] == ["g-broken"]


def test_no_dead_letters_are_no_problem_and_no_such_service_is(rabbitmq_url: str, hello: Path) -> None:
    eventbus("topology", "apply", "hello", "--url", rabbitmq_url, cwd=hello)

    none = eventbus("dead", "list", "greeter", "--url", rabbitmq_url, cwd=hello)
    nobody = eventbus("dead", "list", "gretter", "--url", rabbitmq_url, cwd=hello)

    assert (none.code, none.out) == (0, "greeter has no dead letters\n")
    assert nobody.code == 1
    assert "events.gretter.dead" in nobody.error


# ── settings ────────────────────────────────────────────────────────────────────────────────────────


def test_options_go_before_the_environment_and_that_before_dotenv(broker: BrokerServer, hello: Path) -> None:
    url, wrong = broker.new_vhost(), "amqp://nobody:wrong@127.0.0.1:1/"
    where = f"at 127.0.0.1:{url.rsplit(':', 1)[1].partition('/')[0]}"

    (hello / ".env").write_text(f"EVENTBUS_URL={url}\n")
    by_dotenv = eventbus("version", cwd=hello)
    (hello / ".env").write_text(f"EVENTBUS_URL={wrong}\n")
    by_environment = eventbus("version", cwd=hello, EVENTBUS_URL=url)
    by_option = eventbus("version", "--url", url, cwd=hello, EVENTBUS_URL=wrong)

    for done in (by_dotenv, by_environment, by_option):
        assert (done.code, done.err) == (0, "")
        assert done.out.splitlines()[-1] == f"broker    RabbitMQ {broker.version} {where}"


def test_services_see_what_dotenv_says_to_the_bus(rabbitmq_url: str, hello: Path) -> None:
    (hello / ".env").write_text(f"EVENTBUS_URL={rabbitmq_url}\nEVENTBUS_NAMESPACE=staging\nEVENTBUS_LOG=json\n")
    lifespan = """
from contextlib import asynccontextmanager
from eventbus import Bus

@asynccontextmanager
async def lifespan(service):
    async with Bus() as bus:
        await bus.publish(Left(name="from the lifespan"))
        yield

greeter = greeter.replace(lifespan=lifespan)
"""
    (hello / "hello.py").write_text(HELLO + lifespan)
    eventbus("topology", "apply", "hello", cwd=hello)

    with running("run", "hello:greeter", cwd=hello, wait_for="ready") as worker:
        worker.wait_for("waved from the lifespan")
        assert "namespace staging" in worker.out


# ── what cannot be ──────────────────────────────────────────────────────────────────────────────────


def test_a_wrong_password_is_one_line_that_does_not_show_it(rabbitmq_url: str, hello: Path) -> None:
    wrong = rabbitmq_url.replace("guest:guest", "guest:sesame")

    done = eventbus("run", "hello", "--url", wrong, cwd=hello)

    assert done.code == 1
    assert "refuses the login of user 'guest'" in said_at_the_end(done)
    assert "sesame" not in done.out + done.err


def test_a_queue_with_other_arguments_is_one_line_with_both_sides(broker: BrokerServer, hello: Path) -> None:
    url = broker.new_vhost()
    arguments = {"x-queue-type": "quorum", "x-delivery-limit": 5}
    broker.api("PUT", f"/queues/{vhost_of(url)}/events.greeter.retry", {"durable": True, "arguments": arguments})

    for words in (["run"], ["topology", "apply"]):
        done = eventbus(*words, "hello", "--url", url, cwd=hello)

        assert done.code == 1
        said = said_at_the_end(done)
        for fact in ("'events.greeter.retry'", "x-d", "Use another namespace, or drain and delete"):
            assert fact in said


def test_a_missing_permission_is_one_line_that_names_it(broker: BrokerServer, hello: Path) -> None:
    url = broker.new_vhost()
    eventbus("topology", "apply", "hello", "--url", url, cwd=hello)
    reader = broker.add_user(url, configure="^$", write="^$", read=".*")

    done = eventbus("publish", "greeted.v1", "{}", "--url", reader, cwd=hello)

    assert done.code == 1
    assert "events" in said_at_the_end(done)
    assert "Traceback" not in done.err


def test_a_broker_that_does_not_answer_is_one_line(hello: Path) -> None:
    done = eventbus("publish", "greeted.v1", "{}", "--url", "amqp://guest:guest@127.0.0.1:1/", cwd=hello)

    assert done.code == 1
    assert "no RabbitMQ answered at 127.0.0.1:1" in done.error


def test_with_debug_there_is_a_traceback_before_the_line(hello: Path) -> None:
    done = eventbus("tail", "--url", "http://127.0.0.1/", "--debug", cwd=hello)

    assert done.code == 1
    assert done.err.startswith("Traceback")
    assert done.err.splitlines()[-1].startswith("error: 'http://127.0.0.1/' names no broker")


def said_at_the_end(done: Done) -> str:
    """The error, behind whatever was logged before it."""
    assert "Traceback" not in done.err
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert errors == done.err.splitlines()[-1:]
    return errors[0]


# ── the rest ────────────────────────────────────────────────────────────────────────────────────────


def test_version_says_who_is_here_and_who_answers(broker: BrokerServer, hello: Path) -> None:
    alone = eventbus("version", "--json", cwd=hello).json
    together = eventbus("version", "--json", "--url", broker.url, cwd=hello).json

    assert set(alone) == {"eventbus", "python", "aio-pika", "broker"}
    assert alone["broker"] is None
    assert together["broker"]["product"] == "RabbitMQ"
    assert together["broker"]["version"] == broker.version


def test_the_demo_is_passed_its_options_and_its_exit_code_back(tmp_path: Path) -> None:
    (tmp_path / "services").mkdir()
    (tmp_path / "services" / "__init__.py").touch()
    (tmp_path / "services" / "demo.py").write_text(
        "import json\ndef main(**options):\n    print(json.dumps(options))\n    return 1\n"
    )

    plain = eventbus("demo", cwd=tmp_path, EVENTBUS_URL="amqp://elsewhere/")
    full = eventbus("demo", "--url", "memory://", "--keep", "--sabotage", "lose", "--json", cwd=tmp_path)

    assert plain.json == {"url": None, "keep": False, "sabotage": None, "as_json": False}
    assert full.json == {"url": "memory://", "keep": True, "sabotage": "lose", "as_json": True}
    assert plain.code == full.code == 1


def test_without_a_shop_the_demo_says_where_there_is_one(tmp_path: Path) -> None:
    (tmp_path / "services").mkdir()
    (tmp_path / "services" / "__init__.py").touch()  # the user's own, and found before any other

    done = eventbus("demo", cwd=tmp_path)

    assert done.code == 1
    assert "source checkout" in done.error


def test_colours_are_for_terminals_that_want_them(hello: Path) -> None:
    words = ("topology", "show", "hello")

    assert "\x1b[" in on_a_terminal(*words, cwd=hello).out
    assert "\x1b[1;36m" not in on_a_terminal(*words, cwd=hello, NO_COLOR="1").out
    assert "\x1b" not in eventbus(*words, cwd=hello).out


def test_help_answers_at_once(hello: Path) -> None:
    assert any(cpu_seconds(hello) < 0.5 for _ in range(10))  # a core that is shared counts more seconds for the same


def cpu_seconds(cwd: Path) -> float:
    """What `eventbus --help` costs; not how long it took, which depends on who else is at work here."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert eventbus("--help", cwd=cwd).code == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
