"""Document Registry and Document Repository: ITI-18, ITI-51, ITI-42, ITI-41 (RAD-68) and ITI-43 of this node.

References
----------
* IHE ITI TF-2, 3.18, 3.41, 3.42, 3.43, 3.51
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import TypeVar

from lxml import etree

from xca_imaging import uids
from xca_imaging.errors import (
    DocumentUniqueIdError,
    MalformedMessage,
    RegistryError,
    RepositoryError,
    UnknownRepositoryId,
    XcaImagingError,
)
from xca_imaging.gateway.delivery import Part
from xca_imaging.gateway.exchange import Answer, Context, Operation
from xca_imaging.gateway.on_demand import OnDemandDocuments
from xca_imaging.metadata.model import Submission
from xca_imaging.metadata.stored_query import StoredQuery
from xca_imaging.registry.document_registry import Registry
from xca_imaging.registry.documents import Content, Orphans
from xca_imaging.registry.events import Requester
from xca_imaging.registry.provide import Repository
from xca_imaging.registry.search import Found
from xca_imaging.transactions import iti18, iti41, iti42, iti43, iti51
from xca_imaging.transactions.adhoc_query import QueryResponse
from xca_imaging.transactions.document_set import DocumentRequest, DocumentResponse, RetrieveRequest, RetrieveResponse
from xca_imaging.transactions.registry_response import response_to
from xca_imaging.transactions.submission import ProvideRequest
from xca_imaging.wire.mtom import Reference

T = TypeVar("T")

log = logging.getLogger(__name__)

_CHECK_PAUSE = 0.05  # s after each of 256 parts of the document store: nobody waits for its check
_BATCH = 256 * 1024  # bytes of a query's answer that are read before they are written: some 50 DocumentEntries


class DocumentActors:
    """The registry of this node, and its repository where `repository.unique_id` is set.

    Database and files are used in `executor`, never on the event loop. `on_demand` makes documents that are not stored.
    """

    # Mutable state: `orphans`, what the last check of the store found so far.

    def __init__(
        self,
        registry: Registry,
        repository: Repository | None,
        executor: Executor,
        on_demand: OnDemandDocuments | None = None,
    ) -> None:
        self._registry, self._repository, self._executor = registry, repository, executor
        self._on_demand = on_demand
        self.orphans = Orphans(0, 0)

    async def check_store(self) -> None:
        """Compare stored contents and registered documents once, without haste; `orphans` says what was found."""
        if self._repository is None:
            return
        parts = self._repository.check()
        try:
            while (found := await self._run(partial(next, parts, None))) is not None:
                self.orphans = found
                await asyncio.sleep(_CHECK_PAUSE)
        except XcaImagingError as exc:
            log.warning("the document store could not be checked: %s", exc)
            return
        if self.orphans.missing:
            log.error("%d documents are registered, but their content is not stored", self.orphans.missing)
        if self.orphans.unnamed:
            log.warning("%d stored contents belong to no document", self.orphans.unnamed)

    def registry_operations(self) -> Sequence[Operation]:
        return (
            Operation(iti18.TRANSACTION, iti18.decode_request, self._query, refuse_query),
            Operation(iti51.TRANSACTION, iti51.decode_request, self._query_multiple, refuse_query),
            Operation(iti42.TRANSACTION, iti42.decode_request, self._register, refuse_submission),
        )

    def repository_operations(self) -> Sequence[Operation]:
        return (
            Operation(
                iti41.TRANSACTION, iti41.decode_request, self._provide, refuse_submission, takes_attachments=True
            ),
            Operation(iti43.TRANSACTION, iti43.decode_request, self._retrieve, refuse_retrieval),
        )

    async def find(self, query: StoredQuery) -> Found:
        """Return what a stored query finds; raises RegistryError."""
        return await self._run(partial(self._registry.query, query))

    async def answer(self, query: StoredQuery, encode: Callable[[Iterable[bytes]], Iterator[bytes]]) -> Answer:
        """Answer a stored query with the pieces that `encode` makes of its fragments; raises RegistryError.

        A short answer is whole at once. Of a long one the fragments are read while it is written.
        """
        found = await self.find(query)
        pieces = encode(chain.from_iterable(found.pages()))
        first = await self._run(partial(_next_batch, pieces))
        if len(first) < _BATCH:
            return Answer([first])
        return Answer(self._batches(first, pieces))

    async def _batches(self, first: bytes, pieces: Iterator[bytes]) -> AsyncGenerator[bytes, None]:
        batch = first
        while batch:
            yield batch
            batch = await self._run(partial(_next_batch, pieces))

    async def documents(
        self, requests: Sequence[DocumentRequest], context: Context
    ) -> tuple[list[tuple[DocumentRequest, DocumentResponse, Part]], list[tuple[DocumentRequest, RegistryError]]]:
        """Return the documents of this repository that are asked for, and why the others are not there."""
        found: list[tuple[DocumentRequest, DocumentResponse, Part]] = []
        failed: list[tuple[DocumentRequest, RegistryError]] = []
        for index, request in enumerate(dict.fromkeys(requests), 1):
            try:
                response, part = await self._document(request, f"{index}.document@xca-imaging", context)
                found.append((request, response, part))
            except RegistryError as exc:
                failed.append((request, exc))
        return found, failed

    async def _run(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, call)

    async def _document(
        self, request: DocumentRequest, content_id: str, context: Context
    ) -> tuple[DocumentResponse, Part]:
        unique_id = request.document_unique_id
        if self._repository is None or request.repository_unique_id != self._repository.repository_unique_id:
            raise UnknownRepositoryId(f"{request.repository_unique_id} is not a repository here", unique_id)
        stored = await self._run(partial(self._repository.find, unique_id))
        if stored is not None:
            response = _response(request, stored.mime_type, content_id)
            return response, Part(content_id, stored.mime_type, stored.size, stored.path)
        made = await self._on_demand.make(unique_id, requester_of(context)) if self._on_demand else None
        if made is None:
            raise DocumentUniqueIdError(f"no document {unique_id} in this repository", unique_id)
        response = replace(
            _response(request, made.mime_type, content_id),
            new_repository_unique_id=made.repository_unique_id,
            new_document_unique_id=made.document_unique_id,
        )
        return response, Part(content_id, made.mime_type, len(made.content), made.content)

    # --- operations ---------------------------------------------------------------------------------------------------

    async def _query(self, query: StoredQuery, context: Context) -> Answer:
        return await self.answer(query, partial(iti18.encode_response_fragments, response_to()))

    async def _query_multiple(self, query: StoredQuery, context: Context) -> Answer:
        return await self.answer(query, partial(iti51.encode_response_fragments, response_to()))

    async def _register(self, submission: Submission, context: Context) -> Answer:
        registered = await self._run(partial(self._registry.register, submission))
        return Answer(iti42.encode_response(response_to(registered.warnings)))

    async def _provide(self, request: ProvideRequest, context: Context) -> Answer:
        if self._repository is None:
            raise RepositoryError("this node stores no documents: its repository.unique_id is not set")
        contents = {entry: _content(content, context) for entry, content in request.documents.items()}
        registered = await self._run(partial(self._repository.provide, request.submission, contents))
        return Answer(iti41.encode_response(response_to(registered.warnings)))

    async def _retrieve(self, request: RetrieveRequest, context: Context) -> Answer:
        found, failed = await self.documents(request.documents, context)
        errors = [error.at(asked.document_unique_id) for asked, error in failed]
        body = iti43.encode_response(
            RetrieveResponse(response_to(errors, found=len(found)), tuple(response for _, response, _ in found))
        )
        return Answer(body, [part for _, _, part in found])


def _response(request: DocumentRequest, mime_type: str, content_id: str) -> DocumentResponse:
    return DocumentResponse(
        request.home_community_id,
        request.repository_unique_id,
        request.document_unique_id,
        mime_type,
        Reference(content_id),
    )


def requester_of(context: Context) -> Requester:
    """Return who asks, as events keep it."""
    return Requester(context.caller.name, context.message_id)


def _next_batch(pieces: Iterator[bytes]) -> bytes:
    """Return the next pieces of an answer, about `_BATCH` bytes; less where it ends."""
    batch = bytearray()
    for piece in pieces:
        batch += piece
        if len(batch) >= _BATCH:
            break
    return bytes(batch)


def refuse_query(errors: Sequence[RegistryError]) -> etree._Element:
    """Return the AdhocQueryResponse that holds nothing but errors."""
    return iti18.encode_response(QueryResponse(uids.STATUS_FAILURE, tuple(errors)))


def refuse_submission(errors: Sequence[RegistryError]) -> etree._Element:
    """Return the RegistryResponse of a submission that left no trace."""
    return iti42.encode_response(response_to(errors))


def refuse_retrieval(errors: Sequence[RegistryError]) -> etree._Element:
    """Return the RetrieveDocumentSetResponse without documents."""
    return iti43.encode_response(RetrieveResponse(response_to(errors)))


def _content(content: Reference | bytes, context: Context) -> Content:
    if isinstance(content, bytes):
        return Content.of(content)
    attachment = context.attachments.get(content.content_id)
    if attachment is None:
        raise MalformedMessage(f"the message has no part with Content-ID {content.content_id!r}")
    return Content(attachment.size, attachment.sha1, path=attachment.path)
