"""Events over TLS, on either way: the connection's bytes come in other pieces, and the bus must not notice."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import trustme

from eventbus import Bus, Event, Service, SetupError, Worker
from tests.faults.ledger.proxy import Proxy

EVENTS = 300
LONGEST = 300_000  # characters: several frames, and many of TLS's own records
TIMEOUT_S = 60.0  # on a busy computer


class Written(Event):
    number: int
    text: str


def context(authority: trustme.CA) -> ssl.SSLContext:
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(made)
    return made


def over_tls(url: str, proxy: Proxy, **query: object) -> str:
    parts = urlsplit(url)
    login = parts.netloc.rpartition("@")[0]
    asked = "&".join(f"{name}={value}" for name, value in query.items())
    return f"amqps://{login}@127.0.0.1:{proxy.own_port}{parts.path}?{asked}"


@pytest.mark.parametrize("lane", ["on", "off"])
async def test_events_of_every_size_arrive_whole(
    rabbitmq_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lane: str
) -> None:
    monkeypatch.setenv("EVENTBUS_LANE", lane)
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    sent = {number: str(number) * (LONGEST if number % 100 == 0 else number) for number in range(1, EVENTS + 1)}
    sent = {number: text[:LONGEST] for number, text in sent.items()}
    read: dict[int, str] = {}
    service = Service("library")

    @service.on(Written)
    async def read_it(event: Written) -> None:
        read[event.number] = event.text

    parts = urlsplit(rabbitmq_url)
    async with Proxy(parts.hostname or "", parts.port or 0, tls=context(authority)) as proxy:
        url = over_tls(rabbitmq_url, proxy, cafile=tmp_path / "ca.pem")
        async with Worker(service, url=url), Bus(url) as bus:
            await bus.publish_many([Written(number=number, text=text) for number, text in sent.items()])
            async with asyncio.timeout(TIMEOUT_S):
                while len(read) < EVENTS:  # noqa: ASYNC110  # the broker is another process
                    await asyncio.sleep(0.02)

    assert read == sent


async def test_a_certificate_of_nobody_known_is_refused_with_the_remedy(rabbitmq_url: str) -> None:
    parts = urlsplit(rabbitmq_url)
    async with Proxy(parts.hostname or "", parts.port or 0, tls=context(trustme.CA())) as proxy:
        with pytest.raises(SetupError, match=r"not trusted.*cafile"):
            async with Bus(over_tls(rabbitmq_url, proxy)):
                pass
