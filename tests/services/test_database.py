"""The way every service opens its database, on both that it may be."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from decimal import Decimal
from pathlib import Path
from uuid import uuid4

import pytest
from sqlalchemy import select

from eventbus import SetupError
from services.database import alone, open_database
from services.payments.store import Payment
from services.settings import Settings
from services.tables import TABLES, make_tables
from tests.services.databases import on_each_database

COMPOSE = Path(__file__).parent.parent.parent / "compose"


@on_each_database
async def test_a_block_that_fails_keeps_nothing(settings: Settings) -> None:
    async with open_database(settings, "payments") as database:

        async def fail() -> None:
            async with database.begin() as session:
                session.add(Payment(uuid4(), "captured", amount=Decimal("0.10"), currency="EUR"))
                await session.flush()
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await fail()

        async with database.session() as session:
            assert list(await session.scalars(select(Payment))) == []


@on_each_database
async def test_amounts_are_exact(settings: Settings) -> None:
    amount = Decimal("123456789012.10")
    async with open_database(settings, "payments") as database:
        async with database.begin() as session:
            session.add(Payment(uuid4(), "captured", amount=amount, currency="EUR"))
        async with database.session() as session:
            (payment,) = await session.scalars(select(Payment))

    assert str(payment.amount) == "123456789012.10"


@on_each_database
async def test_what_one_process_reads_alone_no_other_can_change(settings: Settings) -> None:
    order_id = uuid4()
    async with open_database(settings, "payments") as one, open_database(settings, "payments") as other:

        async def add_one(number: int) -> None:
            async with (one, other)[number % 2].begin() as session:
                await alone(session, order_id)
                row = await session.get(Payment, order_id)
                if row is None:
                    row = Payment(order_id, "captured", amount=Decimal(0), currency="EUR")
                    session.add(row)
                row.amount += 1

        await asyncio.gather(*(add_one(number) for number in range(40)))

        async with one.session() as session:
            assert (await session.get_one(Payment, order_id)).amount == 40


async def test_each_service_has_a_database_of_its_own(tmp_path: Path) -> None:
    in_files = Settings(data=tmp_path)
    on_a_server = Settings(database="postgresql://shop@db/{service}")

    assert in_files.database_of("users") == f"sqlite:///{tmp_path}/users.db"
    assert on_a_server.database_of("users") == "postgresql://shop@db/users"


async def test_one_database_for_all_services_is_refused_with_the_remedy_and_without_the_password() -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "services.users.main"),
        env={"SHOP_DATABASE": "postgresql://shop:let-me-in@db/shop"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    said, _ = await process.communicate()

    assert process.returncode == 1
    assert said.startswith(b"SetupError: SHOP_DATABASE names one database")
    assert b"write {service} where" in said
    assert len(said.splitlines()) == 1
    assert b"let-me-in" not in said


async def test_a_database_without_tables_says_how_to_make_them_and_stays_as_it_is(tmp_path: Path) -> None:
    settings = Settings(data=tmp_path)

    with pytest.raises(SetupError, match=r"`python -m services\.tables users`"):
        async with open_database(settings, "users"):
            pass

    assert not await asyncio.to_thread(lambda: list(tmp_path.iterdir()))


@on_each_database
async def test_tables_that_are_there_stay_as_they_are(settings: Settings) -> None:
    async with open_database(settings, "payments") as database:
        async with database.begin() as session:
            session.add(Payment(uuid4(), "captured", amount=Decimal(1), currency="EUR"))

        await make_tables(settings, "payments")

        async with database.session() as session:
            assert len(list(await session.scalars(select(Payment)))) == 1


def test_compose_makes_a_database_for_each_service_that_has_tables(tmp_path: Path) -> None:
    subprocess.run([sys.executable, COMPOSE / "credentials", tmp_path / "users", tmp_path / "databases"], check=True)

    statements = (tmp_path / "databases" / "databases.sql").read_text()
    made = re.findall(r"CREATE DATABASE (\w+)", statements)
    url = (tmp_path / "users" / "shop" / "database-url").read_text()
    assert sorted(made) == sorted([*TABLES, "idempotency"])
    assert Settings(database=url).database_of("users").endswith("@postgres/users")


async def test_the_command_makes_the_tables_of_all_or_of_some(tmp_path: Path) -> None:
    async def command(*services: str) -> tuple[int | None, str]:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "services.tables", *services),
            env={"SHOP_DATA": str(tmp_path)},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        said, _ = await process.communicate()
        return process.returncode, said.decode()

    code, said = await command("users")
    assert (code, said) == (0, f"sqlite:///{tmp_path}/users.db has the tables of users\n")

    code, said = await command()
    assert (code, len(said.splitlines())) == (0, len(TABLES))
    for service in TABLES:
        async with open_database(Settings(data=tmp_path), service):
            pass

    code, said = await command("user")
    assert (code, said) == (1, f"error: no tables of user: there are those of {', '.join(TABLES)}\n")
