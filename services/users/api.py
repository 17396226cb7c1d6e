"""The HTTP door of users: POST /users, GET /health.

POST answers once the broker has the event, before anybody has worked on it. The header `Idempotency-Key` makes the
user's id and the event's, so that the client's retry, after a 503 or no answer at all, is the same registration.
"""

from typing import Annotated
from uuid import UUID, uuid5

from fastapi import FastAPI, Header, HTTPException
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import select

from eventbus import Bus
from schemas import UserRegistered
from services.database import Sessions
from services.http import Email, answer_health, answer_when_the_bus_is_away
from services.users.store import User

# Our own corner of all names: the same key is the same user, here and after a restart.
USERS = UUID("5b0e7c1e-6f0c-4f0e-9d6a-0d4f6a3f6b11")


class NewUser(BaseModel):
    """What a client sends."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(min_length=1, max_length=200)
    email: Email


class Registered(BaseModel):
    """The user is known, and the bus has the news."""

    user_id: UUID
    event_id: str


def create_app(sessions: Sessions, bus: Bus) -> FastAPI:
    """The app, on a database and a bus that somebody else opens and closes."""
    app = FastAPI(title="users")
    answer_when_the_bus_is_away(app)
    answer_health(app, sessions)

    @app.post("/users", status_code=201)
    async def register(
        user: NewUser, idempotency_key: Annotated[str, Header(min_length=1, max_length=200)]
    ) -> Registered:
        user_id = uuid5(USERS, idempotency_key)
        event = UserRegistered(user_id=user_id, name=user.name, email=user.email)
        await remember(sessions, event)
        sent = await bus.publish(event, id=f"user-registered-{user_id}", subject=str(user_id))
        return Registered(user_id=user_id, event_id=sent.id)

    return app


async def remember(sessions: Sessions, event: UserRegistered) -> None:
    """Keep the user before the event leaves; a retry finds itself, anything else that is taken is a conflict."""
    async with sessions.begin() as session:
        known = await session.get(User, event.user_id)
        if known is not None and (known.name, known.email) != (event.name, event.email):
            raise HTTPException(409, "this Idempotency-Key was used for another registration: choose a new one")
        if known is None:
            if await session.scalar(select(User).where(User.email == event.email)) is not None:
                raise HTTPException(409, "this address is registered already")
            session.add(User(event.user_id, event.name, event.email))
