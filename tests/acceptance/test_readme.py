"""Every snippet of the README does what the README says: the file is read, and what it shows is run."""

from __future__ import annotations

import os
import re
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest

from eventbus.settings import Settings

ROOT = Path(__file__).parent.parent.parent
BIN = Path(sys.executable).parent
DEADLINE_S = 240  # mypy without a cache, beside other tests on a busy machine


@dataclass(frozen=True)
class Snippet:
    language: str
    name: str
    text: str
    line: int


def snippets() -> list[Snippet]:
    readme = (ROOT / "README.md").read_text()
    return [
        Snippet(found[1], found[2], found[3], readme[: found.start()].count("\n") + 1)
        for found in re.finditer(r"^```(\w*) ?(\S*)\n(.*?)^```$", readme, re.DOTALL | re.MULTILINE)
    ]


def named(name: str) -> str:
    (text,) = [snippet.text for snippet in snippets() if snippet.name == name]
    return text


def environment(**more: str) -> dict[str, str]:
    ours = {"PATH": f"{BIN}:{os.environ['PATH']}"}
    return {**{k: v for k, v in os.environ.items() if not k.startswith("EVENTBUS_")}, **ours, **more}


def sh(command: str, folder: Path, **more: str) -> str:
    done = subprocess.run(
        ["bash", "-euc", command],
        cwd=folder,
        env=environment(**more),
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A newcomer's folder, with the files that the README shows."""
    for snippet in snippets():
        if snippet.name.endswith(".py"):
            (tmp_path / snippet.name).write_text(snippet.text)
    return tmp_path


def test_hello_is_fifteen_lines_and_says_what_the_readme_says(folder: Path) -> None:
    (shown,) = [snippet.text for snippet in snippets() if snippet.language == "text"]

    said = sh("python hello.py", folder)

    assert said == shown
    assert len([line for line in named("hello.py").splitlines() if line.strip()]) <= 15


def test_hellos_test_passes(folder: Path) -> None:
    said = sh(named("test"), folder)

    assert "1 passed" in said


def test_each_how_to_runs_and_all_are_well_typed(tmp_path: Path) -> None:
    how_tos = [snippet for snippet in snippets() if snippet.language == "python" and not snippet.name]
    files = [f"line_{snippet.line}.py" for snippet in how_tos]
    for file, snippet in zip(files, how_tos, strict=True):
        (tmp_path / file).write_text(snippet.text)
        sh(f"python -W error {file}", tmp_path)

    sh(f"mypy --strict --python-executable {sys.executable} {' '.join(files)}", tmp_path)


# Two requests for one order, then the events that have left the outbox; and an outbox that cannot be read.
ASK = """
import sqlite3, time
from fastapi.testclient import TestClient
from api import app

left = "SELECT type FROM eventbus_outbox WHERE published_ms IS NOT NULL"
path = "/orders/11111111-1111-4111-8111-111111111111"
with TestClient(app) as client:
    print([client.put(path).status_code for _ in range(2)])
    with sqlite3.connect("orders.db") as database:
        while not (events := database.execute(left).fetchall()):
            time.sleep(0.02)
    print([event for (event,) in events])
    while client.get("/ready").status_code != 200:
        time.sleep(0.02)
    with sqlite3.connect("orders.db") as database:
        database.execute("ALTER TABLE eventbus_outbox RENAME TO away")
    while not (problems := (answer := client.get("/ready")).json()):
        time.sleep(0.02)
    print(answer.status_code, problems[0].partition(":")[0])
    with sqlite3.connect("orders.db") as database:
        database.execute("ALTER TABLE away RENAME TO eventbus_outbox")
"""


def test_the_api_commits_an_order_with_its_event_which_leaves(folder: Path) -> None:
    sh("eventbus store create --url sqlite:///orders.db", folder)
    with closing(sqlite3.connect(folder / "orders.db")) as database:
        database.execute("CREATE TABLE orders (id PRIMARY KEY)")

    said = sh(f"python -c '{ASK}'", folder, EVENTBUS_URL="memory://")

    assert said.splitlines() == ["[202, 202]", "['order_placed.v1']", "503 outbox"]
    sh(f"mypy --strict --python-executable {sys.executable} api.py", folder)


# Without the bus's tables, which is found out on an open connection.
CANNOT_START = """
import asyncio, gc
from api import app, lifespan
from eventbus import SetupError

async def main():
    try:
        async with lifespan(app):
            print("started")
    except SetupError as error:
        print("lacks tables" in str(error))
    gc.collect()

asyncio.run(main())
"""


def test_an_api_that_cannot_start_leaves_no_connection_behind(folder: Path) -> None:
    with closing(sqlite3.connect(folder / "orders.db")) as database:
        database.execute("CREATE TABLE orders (id PRIMARY KEY)")

    said = sh(f"python -W always::ResourceWarning -c '{CANNOT_START}' 2>&1", folder, EVENTBUS_URL="memory://")

    assert said == "True\n"


def test_what_one_terminal_publishes_the_other_one_handles(folder: Path, rabbitmq_url: str) -> None:
    with subprocess.Popen(
        ["bash", "-euc", f"exec {named('worker')}"],
        cwd=folder,
        env=environment(EVENTBUS_URL=rabbitmq_url, PYTHONUNBUFFERED="1"),
        stdout=subprocess.PIPE,
        text=True,
    ) as worker:
        assert worker.stdout is not None
        try:
            while worker.stdout.readline().strip() != "ready":
                assert worker.poll() is None
            sh(named("publisher"), folder, EVENTBUS_URL=rabbitmq_url)

            assert worker.stdout.readline().strip() == "thank you, ada@example.com"
        finally:
            worker.terminate()
            worker.wait(DEADLINE_S)
    assert worker.returncode == 0


def test_every_setting_is_in_the_table_and_nothing_else() -> None:
    listed = re.findall(r"^\| `EVENTBUS_(\w+)` \|", (ROOT / "README.md").read_text(), re.MULTILINE)

    assert {name.lower() for name in listed} == set(Settings.model_fields)


def test_the_first_commands_run_the_demo() -> None:
    (first, *_) = [snippet.text for snippet in snippets() if snippet.language == "sh"]
    clone, *commands = first.splitlines()
    assert clone.startswith("git clone")

    for command in commands:
        assert "lost" in sh(command, ROOT)


def test_every_snippet_is_run_by_one_of_these_tests() -> None:
    known = {("sh", ""), ("sh", "worker"), ("sh", "publisher"), ("sh", "test"), ("text", "")}
    known |= {("python", ""), ("python", "hello.py"), ("python", "test_hello.py"), ("python", "api.py")}

    in_the_map = {("", "")}

    assert {(snippet.language, snippet.name) for snippet in snippets()} == known | in_the_map
