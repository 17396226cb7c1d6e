"""The way every service opens its database."""

from __future__ import annotations

import asyncio
import random
from decimal import Decimal
from pathlib import Path
from uuid import uuid4

import pytest
from sqlalchemy import select, text

from services.database import open_database
from services.payments.store import Base, Payment


async def test_sessions_are_given_in_the_order_in_which_they_were_asked_for(tmp_path: Path) -> None:
    served: list[int] = []
    async with open_database(tmp_path / "a.db", Base) as sessions:

        async def work(number: int) -> None:
            async with sessions.begin() as session:
                await session.execute(text("SELECT 1"))
                served.append(number)

        tasks = []
        for number in range(300):
            tasks.append(asyncio.create_task(work(number)))
            for _ in range(random.randrange(4)):  # they come at any moment of the loop
                await asyncio.sleep(0)
        await asyncio.gather(*tasks)

    assert served == list(range(300))


async def test_a_block_that_fails_keeps_nothing(tmp_path: Path) -> None:
    async with open_database(tmp_path / "a.db", Base) as sessions:

        async def fail() -> None:
            async with sessions.begin() as session:
                session.add(Payment(uuid4(), "captured", amount=Decimal("0.10"), currency="EUR"))
                await session.flush()
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await fail()

        async with sessions() as session:
            assert list(await session.scalars(select(Payment))) == []


async def test_amounts_are_exact(tmp_path: Path) -> None:
    amount = Decimal("123456789012.10")
    async with open_database(tmp_path / "a.db", Base) as sessions:
        async with sessions.begin() as session:
            session.add(Payment(uuid4(), "captured", amount=amount, currency="EUR"))
        async with sessions() as session:
            (payment,) = await session.scalars(select(Payment))

    assert str(payment.amount) == "123456789012.10"


async def test_what_one_process_reads_before_it_writes_no_other_can_change(tmp_path: Path) -> None:
    payment = Payment(uuid4(), "captured", amount=Decimal(0), currency="EUR")
    order_id = payment.order_id
    async with open_database(tmp_path / "a.db", Base) as one, open_database(tmp_path / "a.db", Base) as other:
        async with one.begin() as session:
            session.add(payment)

        async def add_one(number: int) -> None:
            async with (one, other)[number % 2].begin() as session:
                row = await session.get_one(Payment, order_id)
                row.amount += 1

        await asyncio.gather(*(add_one(number) for number in range(40)))

        async with one() as session:
            assert (await session.get_one(Payment, order_id)).amount == 40
