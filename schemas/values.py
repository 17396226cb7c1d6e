"""Values that events of several contexts speak of. No event stands here."""

from decimal import Decimal

from pydantic import BaseModel, ConfigDict, Field


class Money(BaseModel):
    """An exact amount in one currency. Amounts travel as JSON strings, since a JSON number is a float to most."""

    model_config = ConfigDict(frozen=True)

    amount: Decimal = Field(ge=0, max_digits=14, decimal_places=2)
    currency: str = Field(pattern="^[A-Z]{3}$", description="ISO 4217")

    def __str__(self) -> str:
        return f"{self.amount} {self.currency}"
