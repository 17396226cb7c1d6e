"""Identity: who the customers are. Published by `users`."""

from uuid import UUID

from pydantic import Field

from eventbus import Event


class UserRegistered(Event, name="user_registered", version=1):
    """Somebody registered; they may be written to."""

    user_id: UUID
    name: str = Field(description="as they want to be called")
    email: str
