"""What the environment says to the shop's services: `SHOP_DATA`, `SHOP_SMTP_PORT` and so on."""

from decimal import Decimal
from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from eventbus import SetupError


class Settings(BaseSettings):
    """One class for all services, so that one environment can run the whole shop; each reads what it needs."""

    model_config = SettingsConfigDict(env_prefix="SHOP_", frozen=True)

    data: Path = Field(default=Path(".eventbus/shop"), description="the folder of the services' files, made if missing")
    database: str | None = Field(
        default=None,
        description="where each service has its database, as postgresql://shop:secret@db/{service}; "
        "without it a SQLite file each, in the folder",
    )
    relay: bool = Field(default=True, description="0: an `eventbus relay` beside the service publishes its outbox")
    http_host: str = "127.0.0.1"
    http_port: int = Field(default=8000, ge=0, le=65535, description="0: any free one")
    smtp_host: str = "127.0.0.1"
    smtp_port: int = Field(default=1025, ge=0, le=65535)
    refuse: int = Field(default=0, ge=0, description="mailbox: the first so many deliveries are refused for now")
    accounts: Annotated[frozenset[str], NoDecode] = Field(
        default=frozenset({"EUR", "GBP", "USD"}), description="payments: the currencies it takes, as EUR,USD"
    )
    payment_limit: Decimal = Field(default=Decimal(1000), description="payments: a larger total is declined")

    @field_validator("accounts", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return [word.strip() for word in value.split(",") if word.strip()] if isinstance(value, str) else value

    @field_validator("database")
    @classmethod
    def _is_one_for_each(cls, value: str | None) -> str | None:
        if value is not None and "{service}" not in value:
            # No ValueError, which would be pydantic's: programs end with a SetupError as one line. The URL has a
            # password, and stays out of it.
            raise SetupError(
                "SHOP_DATABASE names one database for all services, and each needs its own: write {service} where its "
                "name belongs, as postgresql://shop:secret@db/{service}"
            )
        return value

    def database_of(self, service: str) -> str:
        """The URL of the database of *service*."""
        if self.database is None:
            return f"sqlite:///{self.data / service}.db"
        return self.database.replace("{service}", service)
