"""Answers of the registry over HTTP: short ones whole, long ones read while they are written."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import aiohttp
import pytest
from lxml import etree

from tests.gateway.test_exchange import post, serving
from tests.registry.samples import HOME, PATIENT, document, submission
from tests.transactions import schemas
from xca_imaging import errors, uids
from xca_imaging.gateway.documents import DocumentActors, refuse_query
from xca_imaging.gateway.exchange import Answer, Context, Operation
from xca_imaging.gateway.responding import RespondingGateway
from xca_imaging.metadata.stored_query import FindDocuments, GetAll, GetAssociations, StoredQuery
from xca_imaging.registry import Registry
from xca_imaging.registry.database import Database
from xca_imaging.transactions import iti18, iti38
from xca_imaging.transactions.table import Transaction
from xca_imaging.wire import addressing, soap, xml

COUNT = 1200  # 7 MB of metadata: a dozen pages, thirty batches
APPROVED = (uids.APPROVED,)
EVERYTHING = GetAll(
    patient_id=PATIENT, document_status=APPROVED, submission_set_status=APPROVED, folder_status=APPROVED
)
DOCUMENTS = FindDocuments(patient_id=PATIENT, status=APPROVED)


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    path: Path = tmp_path_factory.mktemp("documents") / "registry.db"
    opened = Registry.open(f"sqlite:///{path}", home_community_id=HOME, max_results=0)
    for _ in range(3):
        opened.register(submission(*(document() for _ in range(COUNT // 3))))
    yield opened
    opened.close()


@pytest.fixture
def actors(registry: Registry) -> Iterator[DocumentActors]:
    with ThreadPoolExecutor(2) as executor:
        yield DocumentActors(registry, None, executor)


def operation(actors: DocumentActors, transaction: Transaction) -> Operation:
    operations = [*actors.registry_operations(), *gateway(actors).operations()]
    return next(each for each in operations if each.transaction is transaction)


def gateway(actors: DocumentActors) -> RespondingGateway:
    return RespondingGateway(HOME, actors, None)  # type: ignore[arg-type]  # no images here


def message(transaction: Transaction, query: StoredQuery) -> bytes:
    headers = addressing.request_headers(transaction.request_action, "http://x/", "urn:uuid:1", uids.WSA_ANONYMOUS)
    return soap.write_envelope(headers, iti18.encode_request(query))


def body_of(data: bytes) -> etree._Element:
    body = soap.read_envelope(xml.parse(data, max_markup=10**7)).body
    assert body is not None
    return body


async def test_a_short_answer_has_its_length(actors: DocumentActors, tmp_path: Path) -> None:
    query = StoredQuery(GetAssociations(uuids=("urn:uuid:00000000-1111-4222-8333-444444444444",)))
    async with serving(tmp_path, operation(actors, iti18.TRANSACTION)) as url:
        status, headers, data = await post(url, message(iti18.TRANSACTION, query))
    assert (status, int(headers["Content-Length"])) == (200, len(data))
    schemas.assert_valid(body_of(data))


@pytest.mark.parametrize("return_type", ["LeafClass", "ObjectRef"])
async def test_a_long_answer_is_chunked_whole_and_valid(
    actors: DocumentActors, tmp_path: Path, return_type: str
) -> None:
    query = StoredQuery(EVERYTHING, return_type)  # type: ignore[arg-type]
    async with serving(tmp_path, operation(actors, iti18.TRANSACTION)) as url:
        status, headers, data = await post(url, message(iti18.TRANSACTION, query))
    assert status == 200
    assert headers["Transfer-Encoding"] == "chunked"
    assert headers["Content-Type"] == "application/soap+xml; charset=UTF-8"
    body = body_of(data)
    schemas.assert_valid(body)
    response = iti18.decode_response(body)
    assert response.succeeded
    found = list(response.objects) if return_type == "LeafClass" else list(response.refs)
    assert len(found) == 2 * COUNT + 3  # each document with its membership, three submission sets


async def test_a_gateway_names_its_home_on_everything(actors: DocumentActors, tmp_path: Path) -> None:
    async with serving(tmp_path, operation(actors, iti38.TRANSACTION)) as url:
        _, headers, data = await post(url, message(iti38.TRANSACTION, StoredQuery(EVERYTHING)))
    assert headers["Transfer-Encoding"] == "chunked"
    body = body_of(data)
    schemas.assert_valid(body)
    objects = list(iti38.decode_response(body).objects)
    assert len(objects) == 2 * COUNT + 3
    assert {item.home_community_id for item in objects} == {HOME}


@pytest.mark.parametrize("query", [GetAssociations(uuids=("urn:uuid:1",))])
async def test_a_gateway_wants_to_know_whose_ids_they_are(
    actors: DocumentActors, tmp_path: Path, query: GetAssociations
) -> None:
    async with serving(tmp_path, operation(actors, iti38.TRANSACTION)) as url:
        for home, code in (("", "XDSMissingHomeCommunityId"), ("urn:oid:9.9", "XDSUnknownCommunity")):
            asked = StoredQuery(query, home_community_id=home)
            _, _, data = await post(url, message(iti38.TRANSACTION, asked))
            body = body_of(data)
            schemas.assert_valid(body)
            [error] = iti38.decode_response(body).errors
            assert (error.code, error.location) == (code, HOME)


async def test_http_1_0_gets_a_long_answer_whole(actors: DocumentActors, tmp_path: Path) -> None:
    data = message(iti18.TRANSACTION, StoredQuery(DOCUMENTS))
    async with serving(tmp_path, operation(actors, iti18.TRANSACTION)) as url:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rstrip("/").rpartition(":")[2]))
        writer.write(b"POST / HTTP/1.0\r\nContent-Type: application/soap+xml\r\n")
        writer.write(b"Content-Length: %d\r\n\r\n" % len(data) + data)
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
    assert b"Content-Length: %d" % len(body) in head
    assert len(iti18.decode_response(body_of(body)).objects.documents) == COUNT


async def test_an_answer_that_cannot_be_finished_breaks_off(
    actors: DocumentActors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, calls = Database.reading, iter(range(100))

    def fail_later(database: Database) -> object:
        if next(calls) == 3:
            raise errors.RegistryNotAvailable("the database is gone")
        return reading(database)

    monkeypatch.setattr(Database, "reading", fail_later)
    async with serving(tmp_path, operation(actors, iti18.TRANSACTION)) as url:
        with pytest.raises(aiohttp.ClientPayloadError):
            await post(url, message(iti18.TRANSACTION, StoredQuery(DOCUMENTS)))


async def test_a_client_that_goes_away_leaves_no_transaction_open(
    actors: DocumentActors, registry: Registry, tmp_path: Path
) -> None:
    closed = asyncio.Event()

    async def perform(query: StoredQuery, context: Context) -> Answer:
        answer = await actors.answer(query, lambda fragments: iter(fragments))
        assert isinstance(answer.body, AsyncGenerator)

        async def watched(body: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
            try:
                async for piece in body:
                    yield piece
            finally:
                await body.aclose()
                closed.set()

        return Answer(watched(answer.body))

    asked = Operation(iti18.TRANSACTION, iti18.decode_request, perform, refuse_query)
    async with (
        serving(tmp_path, asked, stall_timeout=5) as url,
        aiohttp.ClientSession(read_bufsize=1024) as session,
        asyncio.timeout(20),
    ):
        data = message(iti18.TRANSACTION, StoredQuery(DOCUMENTS))
        response = await session.post(url, data=data, headers={"Content-Type": "application/soap+xml"})
        assert await response.content.read(10)
        response.close()
        await closed.wait()
    with registry.database.writing():
        pass


async def test_memory_does_not_grow_with_the_answer(actors: DocumentActors) -> None:
    answer = await actors.answer(StoredQuery(DOCUMENTS), lambda fragments: iter(fragments))
    assert isinstance(answer.body, AsyncGenerator)
    size = 0
    tracemalloc.start()
    try:
        async for piece in answer.body:
            size += len(piece)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert size > 6_000_000
    assert peak < 3_000_000, f"{peak} bytes for an answer of {size}"
