"""The identity feed's listener: several messages a connection, odd senders, limits, shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import hl7
import pytest
from hl7.mllp import open_hl7_connection

from tests.registry.samples import HOME
from tests.security.test_tls import Authority, configured
from tests.transactions.test_iti8 import ADMIT, MERGE, PATIENT, SUBSUMED
from xca_imaging.gateway.hl7 import IdentityFeed
from xca_imaging.registry import Registry, events
from xca_imaging.registry.administration import Administration
from xca_imaging.security import tls

DEADLINE = 10.0


class Feeding:
    """A listener before a registry of its own."""

    def __init__(self, registry: Registry, executor: ThreadPoolExecutor) -> None:
        self.registry, self.executor = registry, executor
        self.administration = Administration(registry)
        self.feeds: list[IdentityFeed] = []

    async def listen(self, **options: Any) -> tuple[str, int]:
        feed = IdentityFeed(self.administration, self.executor, **options)
        self.feeds.append(feed)
        return await feed.start("127.0.0.1", 0, None)

    def events(self) -> list[events.Event]:
        with self.registry.database.reading() as connection:
            return [event for _, event in events.read(connection)]


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    opened = Registry.open(f"sqlite:///{tmp_path / 'registry.db'}", home_community_id=HOME)
    yield opened
    opened.close()


@pytest.fixture
async def feeding(registry: Registry) -> AsyncIterator[Feeding]:
    with ThreadPoolExecutor(2) as executor:
        made = Feeding(registry, executor)
        async with asyncio.timeout(DEADLINE):
            yield made
            for feed in made.feeds:
                await feed.close()


def block(text: str) -> bytes:
    return b"\x0b" + text.encode() + b"\x1c\r"


async def answers(reader: asyncio.StreamReader, count: int = 1) -> list[str]:
    """Return the codes of MSA-1 of the next acknowledgements."""
    found = []
    for _ in range(count):
        data = await reader.readuntil(b"\x1c\r")
        assert data[:1] == b"\x0b"
        found.append(str(hl7.parse(data[1:-2].decode("latin-1")).extract_field("MSA", 1, 1)))
    return found


async def test_a_client_of_another_hand_feeds_and_is_answered(feeding: Feeding) -> None:
    host, port = await feeding.listen()
    reader, writer = await open_hl7_connection(host, port)
    for text, expected in ((ADMIT, "AA"), (MERGE, "AA"), (ADMIT.replace("test-1", "test-2"), "AE")):
        writer.writemessage(hl7.parse(text))
        await writer.drain()
        answer = await reader.readmessage()
        assert answer.extract_field("MSA", 1, 1) == expected
        assert answer.extract_field("MSA", 1, 2) == hl7.parse(text).extract_field("MSH", 1, 10)
    writer.close()
    found = feeding.events()
    assert [(each.action, each.outcome) for each in found] == [
        ("add", "success"),
        ("merge", "success"),
        ("add", "refused"),
    ]
    assert (found[1].patient_id, found[1].objects) == (PATIENT, (SUBSUMED,))
    assert found[0].caller == "ADT1/MCM at 127.0.0.1"
    assert found[0].message_id == "MSG00001"


@pytest.mark.parametrize("size", [1, 1000])
async def test_messages_that_come_in_pieces_or_all_at_once(feeding: Feeding, size: int) -> None:
    reader, writer = await asyncio.open_connection(*await feeding.listen())
    stream = b"".join(block(ADMIT.replace("test-1", f"test-{number}")) for number in range(3))
    for start in range(0, len(stream), size):
        writer.write(stream[start : start + size])
        await writer.drain()
    assert await answers(reader, 3) == ["AA"] * 3
    assert [each.patient_id.partition("^")[0] for each in feeding.events()] == ["test-0", "test-1", "test-2"]
    writer.close()


async def test_what_is_no_feed_is_rejected_and_the_connection_goes_on(feeding: Feeding) -> None:
    reader, writer = await asyncio.open_connection(*await feeding.listen())
    writer.write(
        block(ADMIT.replace("ADT^A01^ADT_A01", "ORU^R01")) + block(ADMIT.replace("PID|", "ZID|")) + block(ADMIT)
    )
    assert await answers(reader, 3) == ["AR", "AE", "AA"]
    writer.close()


@pytest.mark.parametrize(
    "stream",
    [b"MSH|^~\\&|", b"\x0bGET / HTTP/1.1\r\n\r\n\x1c\r", b"\x0b" + b"a" * 3000, b"\x0b\x1c\r", b"GET / HTTP/1.1\r\n"],
    ids=["no frame", "no HL7", "too long", "empty", "HTTP"],
)
async def test_what_cannot_be_answered_ends_the_connection(feeding: Feeding, stream: bytes) -> None:
    address = await feeding.listen(max_message=2000)
    reader, writer = await asyncio.open_connection(*address)
    writer.write(stream)
    assert await reader.read() == b""
    writer.close()
    reader, writer = await asyncio.open_connection(*address)  # others are served
    writer.write(block(ADMIT))
    assert await answers(reader) == ["AA"]
    writer.close()


async def test_a_sender_that_stalls_within_a_message(feeding: Feeding) -> None:
    reader, writer = await asyncio.open_connection(*await feeding.listen(stall_timeout=0.05))
    writer.write(block(ADMIT) + b"\x0bMSH|")
    assert await answers(reader) == ["AA"]
    assert await reader.read() == b""
    writer.close()


async def test_a_sender_that_is_quiet_for_too_long(feeding: Feeding) -> None:
    reader, writer = await asyncio.open_connection(*await feeding.listen(idle_timeout=0.05, stall_timeout=DEADLINE))
    assert await reader.read() == b""
    writer.close()


async def test_connections_have_a_limit(feeding: Feeding) -> None:
    address = await feeding.listen(max_connections=1)
    reader, writer = await asyncio.open_connection(*address)
    writer.write(block(ADMIT))
    assert await answers(reader) == ["AA"]
    other, refused = await asyncio.open_connection(*address)
    assert await other.read() == b""
    refused.close()
    writer.close()


async def test_a_message_that_is_being_applied_is_answered_at_shutdown(
    feeding: Feeding, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, apply = threading.Event(), feeding.administration.feed

    def slowly(*arguments: Any) -> Any:
        begun.set()
        time.sleep(0.1)
        return apply(*arguments)

    monkeypatch.setattr(feeding.administration, "feed", slowly)
    address = await feeding.listen()
    reader, writer = await asyncio.open_connection(*address)
    idle, unused = await asyncio.open_connection(*address)
    writer.write(block(ADMIT))
    await asyncio.to_thread(begun.wait, DEADLINE)
    await feeding.feeds[0].close()
    assert await answers(reader) == ["AA"]
    assert await reader.read() == b""
    assert await idle.read() == b""
    unused.close()
    writer.close()


async def test_mutual_tls(feeding: Feeding, tmp_path: Path) -> None:
    Authority("CA").issue(tmp_path, "node", "registry")
    settings = configured(tmp_path)
    server = tls.server_context(settings, settings.http.tls, "http.tls")
    client = tls.client_context(settings, settings.http.tls, "http.tls")
    feed = IdentityFeed(feeding.administration, feeding.executor)
    feeding.feeds.append(feed)
    address = await feed.start("127.0.0.1", 0, server)
    reader, writer = await asyncio.open_connection(*address, ssl=client)
    writer.write(block(ADMIT))
    assert await answers(reader) == ["AA"]
    writer.close()
    await writer.wait_closed()
    reader, writer = await asyncio.open_connection(*address)  # without TLS
    writer.write(block(ADMIT))
    with contextlib.suppress(ConnectionError):
        assert b"MSA" not in await reader.read()
    writer.close()
    assert len(feeding.events()) == 1


async def test_messages_are_counted(feeding: Feeding) -> None:
    counted: list[str] = []
    reader, writer = await asyncio.open_connection(*await feeding.listen(count=counted.append))
    writer.write(block(ADMIT) + block(ADMIT.replace("PID|", "ZID|")))
    await answers(reader, 2)
    assert counted == ["answered", "refused"]
    writer.close()


async def test_a_busy_registry_rejects_for_now(feeding: Feeding, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeding.registry.database, "_busy_timeout", 0.05)
    reader, writer = await asyncio.open_connection(*await feeding.listen())
    with feeding.registry.database.writing():
        writer.write(block(ADMIT))
        assert await answers(reader) == ["AR"]
    writer.write(block(ADMIT))
    assert await answers(reader) == ["AA"]
    writer.close()
