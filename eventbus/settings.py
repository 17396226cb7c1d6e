"""What the environment says: the `EVENTBUS_*` variables, read when asked and never at import.

Arguments win over the environment, and the environment over a `.env` file. Unknown `EVENTBUS_*` variables are left
alone: Kubernetes writes some (`EVENTBUS_PORT`, ...) next to a service that is called eventbus.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from eventbus.errors import SetupError

PREFIX = "EVENTBUS_"

# What to write instead, by variable; said with every mistake.
_REMEDY = {
    "url": "an URL, like amqp://user:password@host/ or memory://",
    "namespace": "lower-case letters, digits, - and _, like 'events'",
    "source": "an URI reference without spaces, like /services/orders",
    "idempotency": "an URL, like memory://, redis://host or postgresql://user:password@host/database",
    "database": "an URL, like postgresql://user:password@host/database or sqlite:///path",
    "declare": "apply, verify or never",
    "lane": "on or off",
    "max_message_bytes": "a whole number of bytes from 1",
    "management_url": "an URL, like http://user:password@host:15672/",
    "log": "console or json",
    "log_level": "debug, info, warning or error",
}
_SECRET = frozenset({"url", "database", "idempotency", "management_url"})


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


_Url = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9+.-]*://\S*$")]


class Settings(BaseModel):
    """What the environment says; each field's variable is its name in capitals behind `EVENTBUS_`."""

    model_config = ConfigDict(frozen=True, extra="ignore", hide_input_in_errors=True)

    url: _Url | None = Field(default=None, repr=False)
    namespace: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]*$")] = "events"
    source: Annotated[str, Field(pattern=r"^\S+$")] | None = None
    idempotency: _Url = Field(default="memory://", repr=False)
    # Where `eventbus relay` finds the outbox.
    database: _Url | None = Field(default=None, repr=False)
    declare: Annotated[Literal["apply", "verify", "never"], BeforeValidator(_lower)] = "apply"
    # Off: events through the AMQP client, several times slower: a way back should a client release break the lane.
    lane: Annotated[Literal["on", "off"], BeforeValidator(_lower)] = "on"
    # None: what the broker allows.
    max_message_bytes: Annotated[int, Field(ge=1)] | None = None
    # None: on the broker's host, where it usually is. Only the commands that look after a broker use it.
    management_url: _Url | None = Field(default=None, repr=False)
    # None: console on a terminal, json elsewhere.
    log: Annotated[Literal["console", "json"], BeforeValidator(_lower)] | None = None
    log_level: Annotated[Literal["debug", "info", "warning", "error"], BeforeValidator(_lower)] = "info"

    @property
    def has_lane(self) -> bool:
        return self.lane == "on"

    @classmethod
    def load(cls, dotenv: Path | None = None) -> Self:
        """Read the environment, and *dotenv* for what it does not say. An empty variable counts as none.

        Raises:
            SetupError: one line for each variable that cannot be; an URL, which may hold a password, is not shown.
        """
        # Imported here: it takes longer to load than the rest of the core, and most imports never read settings.
        from pydantic_settings import BaseSettings, SettingsConfigDict

        class FromEnvironment(cls, BaseSettings):  # type: ignore[misc, valid-type]  # a base that is a variable
            model_config = SettingsConfigDict(
                env_prefix=PREFIX, env_file=dotenv, env_file_encoding="utf-8", env_ignore_empty=True, extra="ignore"
            )

        try:
            found = FromEnvironment()
        except ValidationError as error:
            raise SetupError("\n".join(_mistakes(error))) from None
        except (UnicodeDecodeError, OSError) as error:
            raise SetupError(f"{dotenv} cannot be read ({type(error).__name__}): give a UTF-8 text file") from None
        return cls.model_validate(found.model_dump())


def _mistakes(error: ValidationError) -> list[str]:
    lines: dict[str, None] = {}  # ordered, and once each
    for problem in error.errors():
        field = str(problem["loc"][0])
        said = "is no URL" if field in _SECRET else f"is {problem['input']!r}"
        lines[f"{PREFIX}{field.upper()} {said}: give {_REMEDY[field]}"] = None
    return list(lines)
