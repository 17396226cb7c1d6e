"""The catalogue: complete, and every event comes back as it was sent."""

from __future__ import annotations

import importlib
import pkgutil
from decimal import Decimal
from uuid import uuid4

import pytest
from pydantic import ValidationError

import schemas
from eventbus import Event
from eventbus.service import check_all
from eventbus.testing import context
from schemas import CATALOGUE, Money
from services.settings import Settings

SERVICES = ("audit", "inventory", "marketing", "notifications", "orders", "payments", "shipping")


def defined() -> dict[str, type[Event]]:
    """Every event class of every module of schemas."""
    modules = [importlib.import_module(f"schemas.{found.name}") for found in pkgutil.iter_modules(schemas.__path__)]
    return {
        value.event_type: value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Event) and value is not Event
    }


def test_the_catalogue_holds_every_event_that_is_defined() -> None:
    assert set(CATALOGUE.types) == set(defined())


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_named_like_its_folder_and_subscribes_without_mistakes(name: str) -> None:
    service = importlib.import_module(f"services.{name}.main").service

    assert service.name == name
    assert check_all((service,))[name]


@pytest.mark.parametrize("kind", defined().values(), ids=lambda kind: kind.event_type)
def test_an_event_comes_back_as_it_was_sent(kind: type[Event]) -> None:
    values = {
        "order_id": uuid4(),
        "user_id": uuid4(),
        "name": "Łódź",
        "email": "ada@example.com",
        "address": "1 Sample Street\nExample Town",
        "lines": [{"sku": "mug", "quantity": 2, "unit_price": "0.10"}],
        "total": {"amount": "12345678.90", "currency": "EUR"},
        "amount": {"amount": "0.1", "currency": "EUR"},
        "quantities": {"mug": 2},
        "reason": "because",
        "tracking": "PX1",
    }
    event = kind(**{name: values[name] for name in kind.model_fields})

    envelope = context(event).envelope

    assert envelope.type == kind.event_type
    assert envelope.event(kind) == event


@pytest.mark.parametrize("amount", ["-0.01", "0.001", "NaN", "Infinity", "1000000000000.00"])
def test_an_impossible_amount_is_refused(amount: str) -> None:
    with pytest.raises(ValidationError):
        Money(amount=Decimal(amount), currency="EUR")


def test_accounts_are_read_as_a_list_of_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOP_ACCOUNTS", "EUR, XTS")

    assert Settings().accounts == {"EUR", "XTS"}
