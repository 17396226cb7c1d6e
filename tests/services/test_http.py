"""What all doors have in common: which failures are worth sending again, and when a door is ready."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import httpx
import pytest
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict
from sqlalchemy import bindparam, text
from sqlalchemy.dialects.postgresql import BIGINT
from sqlalchemy.ext.asyncio import AsyncEngine

from eventbus.database import open_engine
from services.database import Database
from services.http import Text, Transaction, put_on
from tests.services.waiting import eventually
from tests.stores import StoreServer


class Named(BaseModel):
    """What a client sends."""

    model_config = ConfigDict(extra="forbid")

    name: Text


def door(engine: AsyncEngine, statement: str, **values: object) -> httpx.AsyncClient:
    """POST / runs *statement* in a transaction."""
    app = FastAPI()
    put_on(app, Database(engine))

    @app.post("/")
    async def act(session: Transaction) -> None:
        numbers = [bindparam(name, type_=BIGINT) for name, value in values.items() if isinstance(value, int)]
        await session.execute(text(statement).bindparams(*numbers), values)

    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://door")


def fails_as(state: str) -> str:
    return f"DO $$ BEGIN RAISE EXCEPTION 'as wanted' USING ERRCODE = '{state}'; END $$"


@pytest.mark.parametrize(
    ("statement", "value", "status"),
    [
        pytest.param(fails_as("40001"), None, 503, id="a serialisation failure"),
        pytest.param(fails_as("40P01"), None, 503, id="a deadlock"),
        pytest.param(fails_as("53300"), None, 503, id="too many connections"),
        pytest.param(fails_as("57P03"), None, 503, id="starting up"),
        pytest.param("SELECT pg_terminate_backend(pg_backend_pid())", None, 503, id="a lost connection"),
        pytest.param("SELECT CAST(:value AS text)", "a\0b", 500, id="text that PostgreSQL does not take"),
        pytest.param("SELECT CAST(:value AS bigint)", 2**63, 500, id="a number that the driver cannot send"),
        pytest.param("SELECT 1 / 0", None, 500, id="a division by zero"),
        pytest.param("SELECT nothing", None, 500, id="a statement that is none"),
        pytest.param(fails_as("23505"), None, 500, id="a row that is there already"),
    ],
)
async def test_send_it_again_is_said_of_what_passes_and_of_nothing_else(
    postgresql_url: str, statement: str, value: object, status: int
) -> None:
    engine = open_engine(postgresql_url)
    values = {} if value is None else {"value": value}
    async with door(engine, statement, **values) as http:
        answer = await http.post("/")
    await engine.dispose()

    assert answer.status_code == status, answer.text
    assert (answer.headers.get("Retry-After") is not None) == (status == 503)


async def test_a_database_that_is_away_or_comes_back_is_no_error_of_ours(
    own_store: Callable[[str], StoreServer],
) -> None:
    server = own_store("postgresql")
    engine, seen = open_engine(server.new_url()), set[int]()

    async with door(engine, "SELECT 1") as http:

        async def is_back() -> bool:
            answer = await http.post("/")
            seen.add(answer.status_code)
            return answer.status_code == 200

        assert await is_back()
        await asyncio.to_thread(server.kill)
        assert not await is_back()
        starting = asyncio.create_task(asyncio.to_thread(server.start))
        await eventually(is_back, "the database answers again")
        await starting
    await engine.dispose()

    assert seen == {200, 503}


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b'{"name": "\\ud800"}', id="half a surrogate pair"),
        pytest.param(b'{"\\udfff": "Ada"}', id="half a surrogate pair in a key"),
        pytest.param(b'{"name": NaN}', id="not a number"),
        pytest.param(b'{"name": -1e999}', id="infinity"),
    ],
)
async def test_what_json_lets_through_and_no_answer_can_quote_is_refused_as_other_bad_input(body: bytes) -> None:
    app, engine = FastAPI(), open_engine("sqlite:///nothing.db")
    put_on(app, Database(engine))

    @app.post("/")
    async def act(named: Named) -> None:
        raise AssertionError(named)

    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://door") as http:
        answer = await http.post("/", content=body, headers={"Content-Type": "application/json"})

    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"][0] == "body"
