"""What is kept and what is dropped when a message is published again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eventbus.message import ATTEMPT, HANDLER, KEPT_PROPERTIES, REASON, Message, matches

BROKERS_OWN = [
    "x-death",
    "x-death-anything",
    "x-first-death-exchange",
    "x-first-death-queue",
    "x-first-death-reason",
    "x-last-death-exchange",
    "x-last-death-queue",
    "x-last-death-reason",
    "x-delivery-count",
    "x-acquired-count",
    "CC",
    "BCC",
]
FOREIGN = ["cloudEvents_id", "traceparent", "x-eventbus-attempt", "x-custom", "cc", "x-match", "", "x-Death"]


@pytest.mark.parametrize("header", BROKERS_OWN)
def test_what_the_broker_wrote_does_not_travel_twice(header: str) -> None:
    message = Message({header: "1", "kept": "2"}, b"body", "text/plain")

    assert message.republished() == Message({"kept": "2"}, b"body", "text/plain")


@pytest.mark.parametrize("header", FOREIGN)
def test_every_other_header_travels_on(header: str) -> None:
    message = Message({header: [1, {"any": b"value"}]}, b"body")

    assert message.republished() == message


def test_new_headers_go_on_top() -> None:
    message = Message({ATTEMPT: 1, "kept": 2, "x-death": []}, b"")

    assert message.republished({ATTEMPT: 2, HANDLER: "mail"}).headers == {ATTEMPT: 2, "kept": 2, HANDLER: "mail"}


def test_properties_that_would_hurt_the_copy_are_dropped() -> None:
    everything = dict.fromkeys([*KEPT_PROPERTIES, "expiration", "user_id", "message_id", "delivery_mode"], "x")

    copied = Message({}, b"", properties=everything).republished()

    assert set(copied.properties) == set(KEPT_PROPERTIES)


def test_a_replay_is_without_the_buss_own_headers() -> None:
    message = Message({ATTEMPT: 3, REASON: "exhausted", "x-eventbus-future": 1, "cloudEvents_id": "1"}, b"body")

    assert message.without_ours() == Message({"cloudEvents_id": "1"}, b"body")


@given(st.dictionaries(st.sampled_from([*BROKERS_OWN, *FOREIGN]), st.integers()), st.binary())
def test_publishing_again_twice_changes_nothing_more_and_the_original_not_at_all(
    headers: dict[str, int], body: bytes
) -> None:
    before = dict(headers)
    message = Message(headers, body)

    once = message.republished()

    assert once.republished() == once
    assert once.body == body
    assert not once.headers.keys() & set(BROKERS_OWN)
    assert message.headers == before


# ── topic matching ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("pattern", "matching", "other"),
    [
        ("order_placed.v1", ["order_placed.v1"], ["order_placed.v2", "order_placed", "x.order_placed.v1", ""]),
        ("order_placed.*", ["order_placed.v1", "order_placed.v2"], ["order_placed", "order_placed.v1.x", "order.v1"]),
        ("payments.#", ["payments", "payments.captured", "payments.captured.v1"], ["payment", "x.payments"]),
        ("#", ["", "a", "a.b.c"], []),
        ("*", ["a"], ["", "a.b"]),
        ("*.*", ["a.b"], ["a", "a.b.c"]),
        ("#.v1", ["v1", "a.v1", "a.b.v1"], ["v1.a", "a.v2"]),
        ("a.#.z", ["a.z", "a.b.z", "a.b.c.z"], ["a", "z", "a.z.b"]),
        ("#.#", ["", "a", "a.b"], []),
        ("a.#.#.b", ["a.b", "a.x.b"], ["a", "b"]),
        ("*.#", ["a", "a.b"], [""]),
        ("#.*", ["a", "a.b"], [""]),
        ("", [""], ["a"]),
    ],
)
def test_topic_matching(pattern: str, matching: list[str], other: list[str]) -> None:
    assert [key for key in matching if not matches(pattern, key)] == []
    assert [key for key in other if matches(pattern, key)] == []


WORDS = st.lists(st.sampled_from(["a", "b", "*", "#"]), max_size=6)
KEYS = st.lists(st.sampled_from(["a", "b"]), max_size=6)


def matches_by_the_book(pattern: list[str], key: list[str]) -> bool:
    """The definition, by backtracking: slow and obvious."""
    if not pattern:
        return not key
    if pattern[0] == "#":
        return any(matches_by_the_book(pattern[1:], key[skipped:]) for skipped in range(len(key) + 1))
    return bool(key) and pattern[0] in ("*", key[0]) and matches_by_the_book(pattern[1:], key[1:])


@given(WORDS, KEYS)
def test_topic_matching_is_that_of_the_specification(pattern: list[str], key: list[str]) -> None:
    assert matches(".".join(pattern), ".".join(key)) == matches_by_the_book(pattern, key)


def test_a_pattern_of_many_hashes_takes_no_longer_for_it() -> None:
    assert not matches(".".join(["#", "a"] * 40), ".".join(["a"] * 39))
