"""Imaging Document Source: RAD-69, and the retrieval that RAD-75 shares with it.

What a retrieval brought is told once, by the ledger of its transfer: to the requester in the answer, to the operator in
one log line and the metrics, without patient data.

References
----------
* IHE RAD TF-2, 4.69.4.2.3 (expected actions: one error per document that is not returned)
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lxml import etree

from xca_imaging import uids
from xca_imaging.errors import RegistryError, RepositoryError
from xca_imaging.gateway.delivery import Part, Stream
from xca_imaging.gateway.documents import refuse_retrieval
from xca_imaging.gateway.exchange import Answer, Context, Operation
from xca_imaging.gateway.receipt import TRANSCODED
from xca_imaging.gateway.streaming import Streaming
from xca_imaging.imaging.holdings import Transfer
from xca_imaging.imaging.ledger import Entry, State, Want
from xca_imaging.imaging.transfer import Transfers
from xca_imaging.operations.metrics import Metrics
from xca_imaging.transactions import rad69
from xca_imaging.transactions.document_set import DocumentRequest, DocumentResponse, RetrieveResponse
from xca_imaging.transactions.imaging_document_set import RetrieveImagingRequest
from xca_imaging.transactions.registry_response import response_to
from xca_imaging.wire import xml
from xca_imaging.wire.mtom import Reference

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Images:
    """What a retrieval brought: a response and a part per instance, and an error per instance that is missing.

    `remarks` are warnings on instances that are there. Where the parts are a stream they are still to come.
    """

    documents: tuple[DocumentResponse, ...]
    parts: Sequence[Part] | Stream
    failed: tuple[tuple[DocumentRequest, RegistryError], ...]
    remarks: tuple[tuple[DocumentRequest, RegistryError], ...] = ()


class ImagingDocumentSource:
    """The PACSs of this node, as documents."""

    def __init__(self, transfers: Transfers, metrics: Metrics) -> None:
        self._transfers, self._metrics = transfers, metrics

    def operations(self) -> Sequence[Operation]:
        return (Operation(rad69.TRANSACTION, rad69.decode_request, self._retrieve, refuse_retrieval),)

    async def images(self, request: RetrieveImagingRequest, context: Context) -> Images:
        """Fetch what is asked for.

        Returns when every instance is held or has failed; to a caller that is streamed to, when it is proved what
        exists. The instances stay in the spool until they are sent, or `context.resources` is unwound. Cancelling this
        cancels the moves that nobody else waits for.
        """
        wants = {
            Want(
                study,
                series,
                document.document_unique_id,
                document.repository_unique_id,
                document.home_community_id or "",
            ): document
            for study, series, document in request
        }
        started = time.monotonic()
        is_streaming = context.caller.delivery == "streaming"
        transfer = await context.resources.enter_async_context(
            self._transfers.fetch(
                tuple(wants),
                accept=request.transfer_syntax_uids,
                asker=context.caller.name,
                weight=context.caller.weight,
                is_streaming=is_streaming,
            )
        )
        context.resources.callback(self._account, transfer, context, started)
        is_streaming = is_streaming and await transfer.planned()
        if not is_streaming:
            await transfer.wait()
        names = {
            want: f"{index}.image@xca-imaging"
            for index, want in enumerate(wants, 1)
            if transfer.ledger[want].state is not State.FAILED
        }
        documents = tuple(
            DocumentResponse(
                wants[want].home_community_id,
                wants[want].repository_unique_id,
                wants[want].document_unique_id,
                uids.MIME_DICOM,
                Reference(name),
            )
            for want, name in names.items()
        )
        failed = tuple((wants[want], error) for want, error in transfer.ledger.outcome().failed)
        if is_streaming:
            return Images(documents, Streaming(transfer, names, _sent(transfer)).parts(), failed)
        remarks = tuple((wants[entry.want], _remark(entry)) for entry in transfer.ledger if entry.bytes_changed)
        return Images(documents, _parts(transfer, names), failed, remarks)

    def _account(self, transfer: Transfer, context: Context, started: float) -> None:
        """Tell the operator what became of a retrieval, once its answer is written or cannot be."""
        summary = transfer.ledger.summary()
        self._metrics.retrieval(summary)
        log.info(
            "retrieval %s for %s: %d of %d instances, %d bytes in %.3f s; %d from the spool, %d asked for again, "
            "%d transcoded, %d failed%s, %d given up",
            _one_line(context.message_id),
            _one_line(context.caller.name),
            summary.held,
            summary.wanted,
            summary.size,
            time.monotonic() - started,
            summary.cached,
            summary.retried,
            summary.changed,
            summary.failed,
            "".join(f" ({code}: {count})" for code, count in summary.errors.items()),
            summary.open,
        )

    async def _retrieve(self, request: RetrieveImagingRequest, context: Context) -> Answer:
        images = await self.images(request, context)
        # RAD-69: the location of an error is the document that it is about.
        return answer_with(images, rad69.encode_response, lambda asked, error: error.at(asked.document_unique_id))


def _one_line(text: str) -> str:
    """Return what a peer wrote as it may stand in a line of log."""
    return " ".join(xml.printable(text, 200).split())


def _remark(entry: Entry) -> RegistryError:
    """Return the warning that tells of an instance that its bytes were changed."""
    text = f"{TRANSCODED} to {entry.transfer_syntax_uid}: these are not the bytes that are stored"
    return RepositoryError(text, entry.want.sop_instance_uid, warning=True)


def _parts(transfer: Transfer, names: Mapping[Want, str]) -> Sequence[Part]:
    """Return the parts of a transfer that is complete."""
    on_sent = _sent(transfer)
    parts = []
    for want, name in names.items():
        instance = transfer.held(want)
        sent = functools.partial(on_sent, want)
        parts.append(Part(name, uids.MIME_DICOM, instance.size, instance.path, sent, instance.sha256 or ""))
    return parts


def _sent(transfer: Transfer) -> Callable[[Want, str], None]:
    """Return what is to be called for each instance once it is sent: its digest is kept, and it is let go."""

    def sent(want: Want, sha256: str) -> None:
        transfer.held(want).keep_sha256(sha256)
        transfer.ledger.digest(want, sha256)
        transfer.release(want)

    return sent


def answer_with(
    images: Images,
    encode: Callable[[RetrieveResponse], etree._Element],
    place: Callable[[DocumentRequest, RegistryError], RegistryError],
) -> Answer:
    """Return the answer that tells the whole truth: a document or an error for each instance, never neither."""
    errors = [place(asked, error) for asked, error in (*images.failed, *images.remarks)]
    registry = response_to(errors, found=len(images.documents))
    return Answer(encode(RetrieveResponse(registry, images.documents)), images.parts)
