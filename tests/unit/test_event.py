"""Names, versions, refusals and the JSON of events; the catalogue."""

from __future__ import annotations

import copy
import traceback
import types
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import Annotated, Any, Generic, NamedTuple, NewType, TypeVar, cast
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import (
    BaseModel,
    Field,
    Secret,
    SecretBytes,
    SecretStr,
    ValidationError,
    field_serializer,
    field_validator,
)
from typing_extensions import TypeAliasType, TypedDict

from eventbus.errors import EnvelopeError, SetupError
from eventbus.event import LONGEST_TYPE, Catalogue, Event, from_json, split_type, to_json

SECRET_DATA = "ada@example.com"


class OrderPlaced(Event, name="order_placed", version=1):
    order_id: UUID
    email: str
    total: Decimal


class OrderPlacedV2(Event, name="order_placed", version=2):
    order_id: UUID
    total_cents: int


class UserRegistered(Event):
    email: str


# ── names and versions ──────────────────────────────────────────────────────────────────────────────


def test_a_name_and_a_version_make_the_type() -> None:
    assert (OrderPlacedV2.event_name, OrderPlacedV2.event_version) == ("order_placed", 2)
    assert OrderPlacedV2.event_type == "order_placed.v2"


@pytest.mark.parametrize(
    ("class_name", "type_"),
    [
        ("UserRegistered", "user_registered.v1"),
        ("HTTPRequested", "http_requested.v1"),
        ("Paid", "paid.v1"),
        ("_Base", "base.v1"),
        ("Order2Placed", "order_2_placed.v1"),
        ("OrderV2Placed", "order_v2_placed.v1"),
    ],
)
def test_the_name_is_the_class_in_snake_case_and_the_version_1_if_left_out(class_name: str, type_: str) -> None:
    assert make(class_name).event_type == type_


def test_names_and_versions_are_not_inherited() -> None:
    class OrderImported(OrderPlacedV2):
        origin: str

    assert OrderImported.event_type == "order_imported.v1"
    assert OrderPlacedV2.event_type == "order_placed.v2"


def test_a_derived_name_that_looks_versioned_is_refused_with_what_to_say_instead() -> None:
    with pytest.raises(SetupError, match=r"say name='order_placed', version=2"):
        make("OrderPlacedV2")
    with pytest.raises(SetupError, match=r"say name='order_placed', version=2"):
        make("OrderPlaced_v2")


@pytest.mark.parametrize("name", ["a", "order_placed", "shop.order_placed", "v1.placed", "a1_2.b", "order_placed_v2"])
def test_names_are_snake_case_words_joined_by_dots(name: str) -> None:
    assert make("X", name=name).event_name == name


@pytest.mark.parametrize(
    "name",
    [
        *("", "OrderPlaced", "order-placed", "order placed", "1st", "_a", "a_", "a__b", ".a", "a.", "a..b", "a\n"),
        *("order_*", "#", "é", "order.v1", "v2", 7, ("a",)),
    ],
)
def test_anything_else_is_no_name(name: Any) -> None:
    with pytest.raises(SetupError, match="name"):
        make("X", name=name)


def test_a_name_that_would_be_read_as_a_version_says_so() -> None:
    with pytest.raises(SetupError, match=r"'order.v3' ends in 'v3'.*version=3"):
        make("X", name="order.v3")


@pytest.mark.parametrize("version", [0, -1, True, 1.0, "1", None])
def test_a_version_is_a_whole_number_from_1(version: Any) -> None:
    with pytest.raises(SetupError, match="is not a version"):
        make("X", version=version)


def test_a_class_whose_name_is_no_ascii_must_be_given_one() -> None:
    with pytest.raises(SetupError, match="give snake_case words"):
        make("Été")
    assert make("Été", name="summer").event_type == "summer.v1"


def test_a_delayed_type_fits_into_a_routing_key() -> None:
    longest = "a" * (LONGEST_TYPE - len(".v1"))

    assert len(f"{'1.' * 24}publish.{make('X', name=longest).event_type}") <= 255
    with pytest.raises(SetupError, match="shorter name"):
        make("X", name=longest + "a")


def test_mistakes_name_the_class() -> None:
    with pytest.raises(SetupError, match=rf"^{__name__}\.Wrong: "):
        make("Wrong", name="No")


@given(st.from_regex(r"[a-z][a-z0-9]{0,8}(_[a-z0-9]{1,8}){0,3}", fullmatch=True), st.integers(1, 10**9 - 1))
def test_a_type_splits_into_its_name_and_version(name: str, version: int) -> None:
    assert split_type(f"{name}.v{version}") == (name, version)


@pytest.mark.parametrize(
    "type_",
    ["com.example.order", "order.v", "order.v0", "order.v01", "order.v1x", "v1", ".v1", "order.V1", "a.v\u0661"],
)
def test_a_type_without_a_version_of_ours_is_all_name(type_: str) -> None:
    assert split_type(type_) == (type_, None)


# ── fields ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("field", ["event_name", "event_version", "event_type"])
def test_fields_with_the_names_of_the_events_own_are_refused(field: str) -> None:
    with pytest.raises(SetupError, match=f"'{field}' is taken"):
        make("X", annotations={field: str})
    with pytest.raises(SetupError, match=f"'{field}' is taken"):
        make("X", body={field: "order_placed"})
    with pytest.raises(SetupError, match=f"'{field}' is taken"):
        make("X", annotations={field: str}, body={field: "with a default"})


@pytest.mark.parametrize("field", ["event_name", "event_version", "event_type"])
def test_they_are_refused_in_an_event_that_derives_from_another_too(field: str) -> None:
    with pytest.raises(SetupError, match=f"'{field}' is taken"):
        types.new_class("X", (OrderPlacedV2,), {}, lambda body: body.update(__annotations__={field: str}))


class Credentials(BaseModel):
    user: str
    password: SecretStr


class Node(BaseModel):
    children: list[Node] = []
    key: SecretBytes | None = None


@dataclass
class Login:
    password: SecretStr


class Row(TypedDict):
    password: SecretStr


class Pair(NamedTuple):
    user: str
    password: SecretStr


Password = NewType("Password", SecretStr)
Alias = TypeAliasType("Alias", list[SecretStr])


@pytest.mark.parametrize(
    "annotation",
    [
        *(SecretStr, SecretBytes, Secret[int], SecretStr | None, list[SecretStr], dict[str, tuple[int, SecretStr]]),
        *(Annotated[SecretStr, Field(min_length=3)], list[Annotated[SecretStr, "x"]], Credentials, list[Node]),
        *(Login, Row, Pair, Password, Alias),
    ],
    ids=str,
)
def test_secrets_are_refused_wherever_they_hide(annotation: object) -> None:
    with pytest.raises(SetupError, match=r"X\.field holds a Secret.*asterisks"):
        make("X", annotations={"field": annotation})


def test_events_are_frozen() -> None:
    event = UserRegistered(email="a")

    with pytest.raises(ValidationError, match="frozen"):
        event.email = "b"  # type: ignore[misc]
    assert event == copy.deepcopy(event)
    assert hash(event) == hash(UserRegistered(email="a"))


def test_a_mistake_in_the_data_does_not_show_the_data() -> None:
    with pytest.raises(ValidationError) as caught:
        OrderPlaced.model_validate({"order_id": SECRET_DATA, "email": "x", "total": SECRET_DATA})

    assert SECRET_DATA not in str(caught.value)


# ── generic and abstract events ─────────────────────────────────────────────────────────────────────

T = TypeVar("T")


class Changed(Event, Generic[T], name="changed", version=3):
    value: T


def test_a_parametrised_event_is_its_origin_read_with_that_parameter() -> None:
    assert Changed[int].event_type == Changed.event_type == "changed.v3"
    assert from_json(Changed[int], b'{"value": "7"}').value == 7


def test_a_subclass_of_a_parametrised_event_has_its_own_name() -> None:
    class PriceChanged(Changed[Decimal]):
        pass

    assert PriceChanged.event_type == "price_changed.v1"


def test_a_secret_parameter_is_refused() -> None:
    with pytest.raises(SetupError, match="holds a SecretStr"):
        Changed[SecretStr]


def test_a_common_base_passes_on_its_fields_and_not_its_name() -> None:
    class ShopEvent(Event):
        tenant: str

    class ItemSold(ShopEvent, version=2):
        sku: str

    assert ItemSold.event_type == "item_sold.v2"
    assert from_json(ItemSold, b'{"tenant": "t", "sku": "s"}') == ItemSold(tenant="t", sku="s")


# ── JSON ────────────────────────────────────────────────────────────────────────────────────────────


@given(
    order_id=st.uuids(),
    email=st.text(),
    total=st.decimals(allow_nan=False, allow_infinity=False),
)
def test_an_event_survives_the_way_through_json(order_id: UUID, email: str, total: Decimal) -> None:
    event = OrderPlaced(order_id=order_id, email=email, total=total)

    assert from_json(OrderPlaced, to_json(event)) == event


@given(st.binary())
def test_bytes_travel_as_base64(content: bytes) -> None:
    event = FileStored(content=content)

    assert from_json(FileStored, to_json(event)) == event
    assert to_json(FileStored(content=b"\xff\xfe")) == b'{"content":"__4="}'


def test_fields_travel_under_their_alias_and_are_read_by_both() -> None:
    event = Aliased(order_id=1)

    assert to_json(event) == b'{"orderId":1}'
    assert from_json(Aliased, b'{"orderId":1}') == from_json(Aliased, b'{"order_id":1}') == event
    assert Aliased.model_validate({"orderId": 1}) == event


def test_unknown_fields_are_ignored() -> None:
    assert from_json(UserRegistered, b'{"email":"a","added_later":1}') == UserRegistered(email="a")


@pytest.mark.parametrize("number", ["inf", "-inf", "nan"])
def test_inf_and_nan_are_refused_at_both_ends(number: str) -> None:
    with pytest.raises(ValidationError, match="finite"):
        Measured(value=float(number))
    with pytest.raises(EnvelopeError, match=r"does not serialise: it holds -?(NaN|Infinity)"):
        to_json(Measured(value=1, more={"hidden": float(number)}))
    with pytest.raises(EnvelopeError, match="does not serialise"):
        to_json(Measured.model_construct(value=float(number), more={}))
    with pytest.raises(EnvelopeError, match="value: finite_number"):
        from_json(Measured, b'{"value":"%s"}' % number.encode())


def test_text_about_infinity_is_just_text() -> None:
    event = UserRegistered(email="NaN, Infinity and -Infinity")

    assert from_json(UserRegistered, to_json(event)) == event


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "no JSON (EOF while parsing a value"),
        (b"garbage", "no JSON (expected value"),
        (b'"\xff"', "no JSON (invalid unicode"),
        (b"[]", "model_type"),
        (b"{}", "order_id: missing; email: missing; total: missing"),
        (b'{"order_id":"%s","email":3,"total":"%s"}' % ((SECRET_DATA.encode(),) * 2), "order_id: uuid_parsing; email"),
    ],
)
def test_data_that_do_not_fit_are_told_by_place_and_kind(data: bytes, said: str) -> None:
    with pytest.raises(EnvelopeError) as caught:
        from_json(OrderPlaced, data)

    assert caught.value.reason == "invalid-data"
    assert str(caught.value).startswith("the data does not fit OrderPlaced (order_placed.v1): ")
    assert said in str(caught.value)


class Contacts(Event):
    by_name: dict[str, int]
    numbers: list[int] = Field(default_factory=list)
    odd: int = 1

    @field_validator("odd")
    @classmethod
    def _is_odd(cls, value: int) -> int:
        if value % 2 == 0:
            raise ValueError(f"{SECRET_DATA} sent an even number")
        return 1 // (value - 3)  # a bug, for 3


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ('{"by_name":{"%s":"x"}}', "by_name.*: int_parsing"),
        ('{"by_name":{"a":"%s"}}', "by_name.*: int_parsing"),
        ('{"by_name":{},"numbers":[1,"%s"]}', "numbers.1: int_parsing"),
        ('{"by_name":{},"odd":2,"more":"%s"}', "odd: value_error"),
        ('{"by_name":{},"odd":3,"more":"%s"}', "ZeroDivisionError in "),
        ('{"by_name":{},"numbers":[' + ",".join(['"%s"'] * 12) + "]}", "numbers.9: int_parsing; and 2 more"),
    ],
)
def test_no_error_shows_the_data(data: str, said: str) -> None:
    data = data.replace("%s", SECRET_DATA)

    with pytest.raises(EnvelopeError) as caught:
        from_json(Contacts, data.encode())

    assert said in str(caught.value)
    assert_hidden(caught.value)


def test_a_plain_model_hides_its_data_as_well() -> None:
    with pytest.raises(
        EnvelopeError, match=r"does not fit Credentials: user: string_type; password: missing"
    ) as caught:
        from_json(Credentials, b'{"user":["%s"]}' % SECRET_DATA.encode())

    assert_hidden(caught.value)


class Blob:
    def __repr__(self) -> str:
        return SECRET_DATA


class Loose(Event):
    anything: Any = None
    number: int = 1
    inner: list[UserRegistered] = Field(default_factory=list)

    @field_serializer("number")
    def _number(self, value: int) -> int:
        if value == 0:
            raise ValueError(SECRET_DATA)
        return value


@pytest.mark.parametrize(
    ("event", "said"),
    [
        (lambda: Loose(anything=Blob()), "anything: Blob"),
        (lambda: Loose(anything=[1, {SECRET_DATA: Blob()}]), "anything.1.*: Blob"),
        (lambda: Loose(anything={"a": "\ud800" + SECRET_DATA}), "anything.*: str"),
        (lambda: Loose(number=0), "number: int"),
        (lambda: unchecked(Loose, inner=[SECRET_DATA]), "inner: list, which the field's type does not allow"),
        (lambda: unchecked(OrderPlaced, email=SECRET_DATA, total=SECRET_DATA), "total: str, which the field's"),
    ],
)
def test_what_does_not_serialise_is_told_by_place_and_kind(event: Callable[[], Event], said: str) -> None:
    with pytest.raises(EnvelopeError) as caught:
        to_json(event())

    assert caught.value.reason == "invalid-envelope"
    assert "does not serialise" in str(caught.value)
    assert said in str(caught.value)
    assert_hidden(caught.value)


# ── the catalogue ───────────────────────────────────────────────────────────────────────────────────

CATALOGUE = Catalogue(OrderPlacedV2, UserRegistered, OrderPlaced)


def test_the_catalogue_finds_events_by_type() -> None:
    assert CATALOGUE.find("order_placed.v1") is OrderPlaced
    assert CATALOGUE.find("order_placed.v3") is None
    assert CATALOGUE.types == ("order_placed.v2", "user_registered.v1", "order_placed.v1")
    assert CATALOGUE.names == ("order_placed", "user_registered")
    assert CATALOGUE.versions("order_placed") == (1, 2)
    assert CATALOGUE.versions("nothing") == ()
    assert list(CATALOGUE) == [OrderPlacedV2, UserRegistered, OrderPlaced]
    assert len(CATALOGUE) == 3


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("order_place", "order_placed"),
        ("user_registred", "user_registered"),
        ("order_placed.v7", "order_placed.v2"),
        ("zzz", None),
    ],
)
def test_the_catalogue_knows_what_was_meant(wrong: str, meant: str | None) -> None:
    assert CATALOGUE.suggest(wrong) == meant


def test_two_classes_cannot_claim_one_type() -> None:
    with pytest.raises(SetupError, match=r"OrderPlaced and .*Other are both 'order_placed\.v1'"):
        Catalogue(OrderPlaced, make("Other", name="order_placed"))
    assert len(Catalogue(OrderPlaced, OrderPlaced)) == 1


@pytest.mark.parametrize("nonsense", [Event, BaseModel, "order_placed", UserRegistered(email="a")])
def test_only_events_are_catalogued(nonsense: Any) -> None:
    with pytest.raises(SetupError, match="is no event"):
        Catalogue(nonsense)


def test_an_event_whose_annotations_cannot_be_resolved_is_refused_at_start_up() -> None:
    unresolved = make("X", annotations={"field": "Nowhere"})

    with pytest.raises(SetupError, match="not fully defined"):
        Catalogue(unresolved)
    with pytest.raises(SetupError, match="not fully defined"):
        from_json(unresolved, b"{}")


def test_a_secret_that_was_only_named_at_first_is_refused_by_the_catalogue(monkeypatch: pytest.MonkeyPatch) -> None:
    late = make("X", annotations={"field": "DefinedLater"})
    monkeypatch.setitem(globals(), "DefinedLater", SecretStr)

    with pytest.raises(SetupError, match=r"X\.field holds a SecretStr"):
        Catalogue(late)


class FileStored(Event):
    content: bytes


class Aliased(Event):
    order_id: int = Field(alias="orderId")


class Measured(Event):
    value: float
    more: dict[str, Any] = Field(default_factory=dict)


def make(
    class_name: str, *, annotations: dict[str, Any] | None = None, body: Any = None, **keywords: Any
) -> type[Event]:
    """An event class made by a class statement, with whatever name."""
    namespace = {
        "__module__": __name__,
        "__qualname__": class_name,
        "__annotations__": annotations or {},
        **(body or {}),
    }
    made: Any = types.new_class(class_name, (Event,), keywords, lambda body: body.update(namespace))
    return cast("type[Event]", made)


def unchecked(event: type[Event], **fields: object) -> Event:
    """An event whose fields were never validated, as `model_copy(update=...)` makes it too."""
    return event.model_construct(None, **fields)


def assert_hidden(error: BaseException) -> None:
    """No one who prints *error* with its causes sees the data."""
    assert SECRET_DATA not in "".join(traceback.format_exception(error))
