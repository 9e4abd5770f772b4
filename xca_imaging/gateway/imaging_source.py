"""Imaging Document Source: RAD-69, and the retrieval that RAD-75 shares with it.

References
----------
* IHE RAD TF-2, 4.69.4.2.3 (expected actions: one error per document that is not returned)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lxml import etree

from xca_imaging import uids
from xca_imaging.errors import RegistryError
from xca_imaging.gateway.delivery import Part
from xca_imaging.gateway.documents import refuse_retrieval
from xca_imaging.gateway.exchange import Answer, Context, Operation
from xca_imaging.imaging.ledger import Want
from xca_imaging.imaging.transfer import Transfers
from xca_imaging.operations.metrics import Metrics
from xca_imaging.transactions import rad69
from xca_imaging.transactions.document_set import DocumentRequest, DocumentResponse, RetrieveResponse
from xca_imaging.transactions.imaging_document_set import RetrieveImagingRequest
from xca_imaging.transactions.registry_response import response_to
from xca_imaging.wire.mtom import Reference


@dataclass(frozen=True, slots=True)
class Images:
    """What a retrieval brought: a response and a part per instance, and an error per instance that is missing."""

    documents: tuple[DocumentResponse, ...]
    parts: tuple[Part, ...]
    failed: tuple[tuple[DocumentRequest, RegistryError], ...]


class ImagingDocumentSource:
    """The PACSs of this node, as documents."""

    def __init__(self, transfers: Transfers, metrics: Metrics) -> None:
        self._transfers, self._metrics = transfers, metrics

    def operations(self) -> Sequence[Operation]:
        return (Operation(rad69.TRANSACTION, rad69.decode_request, self._retrieve, refuse_retrieval),)

    async def images(self, request: RetrieveImagingRequest, context: Context) -> Images:
        """Fetch what is asked for; returns when every instance is held or has failed.

        The instances stay in the spool until `context.resources` is unwound. Cancelling this cancels the moves that
        nobody else waits for.
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
        transfer = await context.resources.enter_async_context(
            self._transfers.fetch(tuple(wants), accept=request.transfer_syntax_uids, asker=context.caller.name)
        )
        await transfer.wait()
        outcome = transfer.ledger.outcome()
        assert not outcome.missing
        documents, parts = [], []
        for index, want in enumerate(outcome.held, 1):
            instance, asked = transfer.held(want), wants[want]
            content_id = f"{index}.image@xca-imaging"
            parts.append(Part(content_id, uids.MIME_DICOM, instance.size, instance.path))
            documents.append(
                DocumentResponse(
                    asked.home_community_id,
                    asked.repository_unique_id,
                    asked.document_unique_id,
                    uids.MIME_DICOM,
                    Reference(content_id),
                )
            )
        failed = [(wants[want], error) for want, error in outcome.failed]
        self._metrics.instances(held=len(documents), failed=len(failed))
        return Images(tuple(documents), tuple(parts), tuple(failed))

    async def _retrieve(self, request: RetrieveImagingRequest, context: Context) -> Answer:
        images = await self.images(request, context)
        # RAD-69: the location of an error is the document that it is about.
        return answer_with(images, rad69.encode_response, lambda asked, error: error.at(asked.document_unique_id))


def answer_with(
    images: Images,
    encode: Callable[[RetrieveResponse], etree._Element],
    place: Callable[[DocumentRequest, RegistryError], RegistryError],
) -> Answer:
    """Return the answer that tells the whole truth: a document or an error for each instance, never neither."""
    errors = [place(asked, error) for asked, error in images.failed]
    registry = response_to(errors, found=len(images.documents))
    return Answer(encode(RetrieveResponse(registry, images.documents)), images.parts)
