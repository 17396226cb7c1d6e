"""The HTTP door of users: POST /users, GET /health, GET /ready.

POST answers once the user and the event are committed, before the broker or anybody else has heard of it. The header
`Idempotency-Key` makes the user's id and the event's, so that the client's retry, after a 503 or no answer at all, is
the same registration.
"""

from typing import Annotated
from uuid import UUID, uuid5

from fastapi import FastAPI, Header, HTTPException
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from eventbus.outbox import Outbox
from schemas import UserRegistered
from services.database import Database, alone
from services.http import Email, Text, Transaction, put_on
from services.users.store import User

# Our own corner of all names: the same key is the same user, here and after a restart.
USERS = UUID("5b0e7c1e-6f0c-4f0e-9d6a-0d4f6a3f6b11")


class NewUser(BaseModel):
    """What a client sends."""

    model_config = ConfigDict(extra="forbid")

    name: Text = Field(min_length=1, max_length=200)
    email: Email


class Registered(BaseModel):
    """The user is known, and the news will leave."""

    user_id: UUID
    event_id: str


def create_app(database: Database) -> FastAPI:
    """The app, on a database that somebody else opens and closes."""
    app = FastAPI(title="users")
    put_on(app, database)
    outbox = Outbox(source="/services/users")

    @app.post("/users", status_code=201)
    async def register(
        user: NewUser,
        idempotency_key: Annotated[str, Header(min_length=1, max_length=200)],
        session: Transaction,
    ) -> Registered:
        user_id = uuid5(USERS, idempotency_key)
        event = UserRegistered(user_id=user_id, name=user.name, email=user.email)
        event_id = f"user-registered-{user_id}"
        if await remember(session, event):
            await outbox.publish(session, event, id=event_id, subject=str(user_id))
        return Registered(user_id=user_id, event_id=event_id)

    return app


async def remember(session: AsyncSession, event: UserRegistered) -> bool:
    """Keep the user; whether it is a new one. A retry finds itself, anything else that is taken is a conflict."""
    await alone(session, event.user_id, event.email)
    known = await session.get(User, event.user_id)
    if known is not None and (known.name, known.email) != (event.name, event.email):
        raise HTTPException(409, "this Idempotency-Key was used for another registration: choose a new one")
    if known is not None:
        return False
    if await session.scalar(select(User).where(User.email == event.email)) is not None:
        raise HTTPException(409, "this address is registered already")
    session.add(User(event.user_id, event.name, event.email))
    return True
