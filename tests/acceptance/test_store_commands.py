"""`eventbus store` and workers on a shared store, as programs: what they print, and what they end with."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.programs import eventbus

NOBODY = "127.0.0.1:1"


@pytest.mark.parametrize("name", ["sqlite", "postgresql"])
def test_tables_are_made_and_checked(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    url: str = request.getfixturevalue(f"{name}_url")
    shown = url.replace("let-me-in", "***")
    missing = eventbus("store", "check", "--url", url, "--json", cwd=tmp_path)
    assert (missing.code, missing.json["url"]) == (3, shown)
    assert len(missing.json["problems"]) == 1
    assert f"`eventbus store create --url {shown}`" in missing.json["problems"][0]

    created = eventbus("store", "create", "--url", url, cwd=tmp_path)
    assert (created.code, created.out) == (0, f"{shown} has the tables\n")
    again = eventbus("store", "create", "--json", cwd=tmp_path, EVENTBUS_IDEMPOTENCY=url)
    assert (again.code, again.json) == (0, {"url": shown, "needs_tables": True})

    checked = eventbus("store", "check", cwd=tmp_path, EVENTBUS_IDEMPOTENCY=url)
    assert (checked.code, checked.out) == (0, f"{shown} is as it must be\n")


def test_checking_makes_no_file(sqlite_url: str, tmp_path: Path) -> None:
    assert eventbus("store", "check", "--url", sqlite_url, cwd=tmp_path).code == 3

    assert [*tmp_path.iterdir()] == []


def test_a_redis_needs_no_tables(redis_url: str, tmp_path: Path) -> None:
    created = eventbus("store", "create", "--url", redis_url, cwd=tmp_path)
    assert (created.code, created.out) == (0, f"{redis_url} needs no tables\n")

    checked = eventbus("store", "check", "--url", redis_url, "--json", cwd=tmp_path)
    assert (checked.code, checked.json) == (0, {"url": redis_url, "problems": []})


@pytest.mark.parametrize("command", ["create", "check"])
@pytest.mark.parametrize(
    ("url", "what"),
    [
        ("memory://", "memory:// lives inside one process, and this command is another one"),
        (f"postgresql://ada:secret@{NOBODY}/shop", f"postgresql://ada:***@{NOBODY}/shop did not do it: "),
        ("mysql://ada:secret@host/shop", "'mysql://ada:***@host/shop'"),
    ],
)
def test_what_cannot_be_made_or_looked_at_is_one_line(command: str, url: str, what: str, tmp_path: Path) -> None:
    done = eventbus("store", command, "--url", url, cwd=tmp_path)

    assert done.code == 1
    assert what in done.error
    assert "secret" not in done.error


def test_a_file_in_a_folder_that_there_is_not_cannot_be_made(tmp_path: Path) -> None:
    done = eventbus("store", "create", "--url", f"sqlite:///{tmp_path / 'none' / 'x.db'}", cwd=tmp_path)

    assert done.code == 1
    assert "OperationalError: unable to open database file" in done.error


def test_a_redis_that_is_down_cannot_be_checked(tmp_path: Path) -> None:
    done = eventbus("store", "check", "--url", f"redis://ada:secret@{NOBODY}/0", cwd=tmp_path)

    assert done.code == 1
    assert done.error.startswith(f"redis://ada:***@{NOBODY}/0 did not do it: ConnectionError: ")


SHOP = """
from eventbus import Event, Service

shop = Service("shop")


class Placed(Event, name="placed"):
    order_id: int


@shop.on("placed")
async def handle(event: Placed) -> None: ...
"""


def test_a_worker_whose_store_lacks_its_tables_says_how_to_make_them(
    rabbitmq_url: str, sqlite_url: str, tmp_path: Path
) -> None:
    (tmp_path / "shop.py").write_text(SHOP)

    done = eventbus("run", "shop:shop", "--url", rabbitmq_url, "--idempotency", sqlite_url, cwd=tmp_path)

    assert done.code == 1
    assert f"lacks tables of the bus: make them with `eventbus store create --url {sqlite_url}`" in done.error


@pytest.mark.parametrize(
    ("url", "missing", "extra"),
    [
        ("sqlite:///x.db", "sqlalchemy", "sql"),
        ("sqlite:///x.db", "aiosqlite", "sql"),
        ("postgresql://host/shop", "asyncpg", "sql"),
        ("redis://host/0", "redis", "redis"),
    ],
)
def test_a_driver_that_is_not_installed_is_named_with_what_to_install(
    url: str, missing: str, extra: str, tmp_path: Path
) -> None:
    # As Python has it where a package is not there: to import it raises ModuleNotFoundError.
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.abc, sys\n"
        "class Missing(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {missing!r}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Missing())\n"
    )

    done = eventbus("store", "check", "--url", url, cwd=tmp_path, PYTHONPATH=str(tmp_path))

    assert done.code == 1
    assert f"needs {missing}: pip install 'eventbus[{extra}]'" in done.error
