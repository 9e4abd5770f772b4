"""What a retrieval tells: to the requester, to the operator's log and to the metrics, all from one ledger."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Literal

import pytest

from xca_imaging import errors, uids
from xca_imaging.gateway.callers import Caller
from xca_imaging.gateway.exchange import Answer, Context
from xca_imaging.gateway.imaging_source import ImagingDocumentSource
from xca_imaging.gateway.receipt import TRANSCODED
from xca_imaging.imaging.holdings import Brought, Transfer
from xca_imaging.imaging.ledger import Want
from xca_imaging.imaging.spool import Spool
from xca_imaging.operations.metrics import Metrics
from xca_imaging.transactions import rad69
from xca_imaging.transactions.document_set import DocumentRequest, RetrieveResponse
from xca_imaging.transactions.imaging_document_set import RetrieveImagingRequest, SeriesRequest, StudyRequest

STUDY, SERIES, LOCATION = "1.2", "1.2.3", "1.2.9"
UIDS = ("1.2.3.1", "1.2.3.2", "1.2.3.3")
JPEG = "1.2.840.10008.1.2.4.70"


class Transfers:
    """Has the first instance in the spool, brings and transcodes the second, fails the third."""

    def __init__(self, spool: Spool) -> None:
        self.spool = spool
        self.asked: dict[str, object] = {}

    @asynccontextmanager
    async def fetch(self, wants: Iterable[Want], **asked: object) -> AsyncIterator[Transfer]:
        self.asked = asked
        transfer = Transfer(wants, (uids.EXPLICIT_VR_LITTLE_ENDIAN,), is_streaming=bool(asked["is_streaming"]))
        first, second, third = (entry.want for entry in transfer.ledger)
        for want, changed, brought in ((first, False, Brought()), (second, True, Brought(2, "main", "c-move"))):
            writer = self.spool.create(
                sop_class_uid="1.2.840.10008.5.1.4.1.1.2",
                sop_instance_uid=want.sop_instance_uid,
                transfer_syntax_uid=uids.EXPLICIT_VR_LITTLE_ENDIAN,
                source_ae_title="PACS",
            )
            writer.write(memoryview(b"content"))
            instance = writer.commit()
            instance.place(STUDY, SERIES, [], source="main", bytes_changed=changed)
            transfer.hold(want, instance, brought)
        transfer.fail(third, errors.DocumentUniqueIdError("not there", third.sop_instance_uid))
        transfer.plan(is_proved=True)
        yield transfer
        transfer.release_all()


class Retrieved:
    def __init__(self, answer: Answer, response: RetrieveResponse, log: str, metrics: str, asked: dict[str, object]):
        self.answer, self.response, self.log, self.metrics, self.asked = answer, response, log, metrics, asked


async def retrieve(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, delivery: Literal["spooled", "streaming"] = "spooled"
) -> Retrieved:
    spool = Spool(tmp_path, max_bytes=10**7, retention=60)
    transfers, metrics = Transfers(spool), Metrics()
    source = ImagingDocumentSource(transfers, metrics)  # type: ignore[arg-type]
    (operation,) = source.operations()
    documents = tuple(DocumentRequest(None, LOCATION, uid) for uid in UIDS)
    request = RetrieveImagingRequest(
        (StudyRequest(STUDY, (SeriesRequest(SERIES, documents),)),), (uids.EXPLICIT_VR_LITTLE_ENDIAN,)
    )
    caller = Caller("East", "urn:oid:1.2.840.2", 3.0, delivery)
    with caplog.at_level(logging.INFO):
        async with AsyncExitStack() as resources:
            answer = await operation.perform(request, Context(caller, "urn:uuid:7\nforged line", {}, resources))
            response = rad69.decode_response(answer.body)  # type: ignore[arg-type]
            parts = answer.parts if isinstance(answer.parts, (tuple, list)) else await anext(answer.parts)  # type: ignore[arg-type]
            for part in parts:
                part.on_sent("ab" * 32)
            assert spool.find(UIDS[0]).sha256 == "ab" * 32  # type: ignore[union-attr]
            assert spool.free_bytes == 10**7  # what was sent is let go of
            if not isinstance(answer.parts, (tuple, list)):
                await answer.parts.aclose()  # type: ignore[union-attr]
    spool.close()
    (line,) = [each.getMessage() for each in caplog.records if each.name == "xca_imaging.gateway.imaging_source"]
    return Retrieved(answer, response, line, metrics.exposition().decode(), transfers.asked)


async def test_one_ledger_is_told_to_all(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    got = await retrieve(tmp_path, caplog)
    assert got.asked["asker"] == "East"
    assert got.asked["weight"] == 3.0
    registry = got.response.registry
    assert registry.status == uids.STATUS_PARTIAL_SUCCESS
    assert [document.document_unique_id for document in got.response.documents] == list(UIDS[:2])
    assert [(error.location, error.warning) for error in registry.errors] == [(UIDS[2], False), (UIDS[1], True)]
    assert TRANSCODED in registry.errors[1].context
    size = got.answer.parts[0].size + got.answer.parts[1].size  # type: ignore[index]
    assert "\n" not in got.log
    assert "retrieval urn:uuid:7 forged line for East: 2 of 3 instances" in got.log
    assert f"{size} bytes" in got.log
    assert "1 from the spool, 1 asked for again, 1 transcoded, 1 failed (XDSDocumentUniqueIdError: 1)" in got.log
    assert not any(uid in got.log for uid in UIDS)
    for line in (
        'xca_imaging_instances_total{state="held"} 2.0',
        'xca_imaging_instances_total{state="failed"} 1.0',
        "xca_imaging_instances_from_spool_total 1.0",
        "xca_imaging_instances_changed_total 1.0",
        'xca_imaging_instances_brought_total{method="c-move"} 1.0',
        f"xca_imaging_held_bytes_total {float(size)}",
    ):
        assert line in got.metrics


async def test_streamed_the_root_has_what_failed_already(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    got = await retrieve(tmp_path, caplog, "streaming")
    assert got.asked["is_streaming"] is True
    assert got.response.registry.status == uids.STATUS_PARTIAL_SUCCESS
    assert [document.document_unique_id for document in got.response.documents] == list(UIDS[:2])
    assert [error.location for error in got.response.registry.errors] == [UIDS[2]]
