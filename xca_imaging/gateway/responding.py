"""Responding Gateway and Responding Imaging Gateway: ITI-38, ITI-39 and RAD-75 from other communities.

References
----------
* IHE ITI TF-2, 3.38.4.1.3, 3.39.4.1.3 (expected actions); IHE RAD TF-2, 4.75.4
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial

from lxml import etree

from xca_imaging.errors import MissingHomeCommunityId, RegistryError, UnknownCommunity
from xca_imaging.gateway.documents import DocumentActors, refuse_query, refuse_retrieval
from xca_imaging.gateway.exchange import Answer, Context, Operation
from xca_imaging.gateway.imaging_source import Images, ImagingDocumentSource, answer_with
from xca_imaging.metadata.stored_query import StoredQuery
from xca_imaging.transactions import iti38, iti39, rad75
from xca_imaging.transactions.document_set import DocumentRequest, RetrieveRequest, RetrieveResponse
from xca_imaging.transactions.imaging_document_set import RetrieveImagingRequest
from xca_imaging.transactions.registry_response import response_to


class RespondingGateway:
    """The face of this community towards others; `home_community_id` is its own."""

    def __init__(
        self, home_community_id: str, documents: DocumentActors, imaging_source: ImagingDocumentSource
    ) -> None:
        self._home, self._documents, self._imaging_source = home_community_id, documents, imaging_source

    def operations(self) -> Sequence[Operation]:
        return (
            Operation(iti38.TRANSACTION, iti38.decode_request, self._query, self._refuse_query),
            Operation(iti39.TRANSACTION, iti39.decode_request, self._retrieve, self._refuse_retrieval),
        )

    def imaging_operations(self) -> Sequence[Operation]:
        return (Operation(rad75.TRANSACTION, rad75.decode_request, self._retrieve_imaging, self._refuse_retrieval),)

    async def _query(self, query: StoredQuery, context: Context) -> Answer:
        home = query.home_community_id
        if home and home != self._home:
            raise UnknownCommunity(f"{home} is not this community")
        if not home and not query.names_patients:
            raise MissingHomeCommunityId("a query by the ids of objects needs AdhocQuery/@home")
        encode = partial(iti38.encode_response_fragments, response_to(), home_community_id=self._home)
        return await self._documents.answer(query, encode)

    async def _retrieve(self, request: RetrieveRequest, context: Context) -> Answer:
        ours, failed = self._split(request.documents)
        found, not_found = await self._documents.documents(ours, context)
        errors = [self._place(asked, error) for asked, error in [*failed, *not_found]]
        body = iti39.encode_response(
            RetrieveResponse(response_to(errors, found=len(found)), tuple(response for _, response, _ in found))
        )
        return Answer(body, [part for _, _, part in found])

    async def _retrieve_imaging(self, request: RetrieveImagingRequest, context: Context) -> Answer:
        ours, failed = self._split(document for _, _, document in request)
        images = Images((), (), ())
        if ours:
            images = await self._imaging_source.images(request.only(ours), context)
        images = replace(images, failed=(*failed, *images.failed))
        return answer_with(images, rad75.encode_response, self._place)

    def _split(
        self, documents: Iterable[DocumentRequest]
    ) -> tuple[list[DocumentRequest], list[tuple[DocumentRequest, RegistryError]]]:
        """Return what is addressed to this community, and an error for each document that is not."""
        ours: list[DocumentRequest] = []
        failed: list[tuple[DocumentRequest, RegistryError]] = []
        for document in dict.fromkeys(documents):
            if document.home_community_id == self._home:
                ours.append(document)
            elif document.home_community_id:
                failed.append((document, UnknownCommunity(f"{document.home_community_id} is not this community")))
            else:
                failed.append((document, MissingHomeCommunityId("DocumentRequest has no HomeCommunityId")))
        return ours, failed

    def _place(self, asked: DocumentRequest, error: RegistryError) -> RegistryError:
        """Put an error where both rules find it: the gateway in `location` (3.38, RAD-75), the document in the text."""
        context = error.context
        if asked.document_unique_id not in context:
            context = f"{asked.document_unique_id}: {context}"
        return error.at(self._home, context)

    def _refuse_query(self, errors: Sequence[RegistryError]) -> etree._Element:
        return refuse_query([error.at(self._home) for error in errors])

    def _refuse_retrieval(self, errors: Sequence[RegistryError]) -> etree._Element:
        return refuse_retrieval([error.at(self._home) for error in errors])
