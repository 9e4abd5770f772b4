"""Where publishing registers, and where it fetches objects: inside this node, at its endpoints, or elsewhere.

References
----------
* IHE ITI TF-2, 3.18, 3.43; IHE ITI XDS Metadata Update, 3.57; IHE RAD TF-2, 4.68, 4.69
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import TypeVar

from xca_imaging import uids
from xca_imaging.errors import (
    DocumentUniqueIdError,
    RegistryError,
    RepositoryError,
    RepositoryOutOfResources,
    SubmissionRefused,
    UnknownRepositoryId,
)
from xca_imaging.gateway.peers import Endpoint, MemorySink, SoapClient
from xca_imaging.gateway.publications import Publications, Sent
from xca_imaging.gateway.publishing_peers import NotPublished
from xca_imaging.gateway.publishing_peers import Repository as PublishingRepository
from xca_imaging.imaging.ledger import Want
from xca_imaging.imaging.study import SeriesFacts, StudyContents, StudyFacts
from xca_imaging.imaging.transfer import Transfers
from xca_imaging.metadata import ebrim
from xca_imaging.metadata.model import DocumentEntry, Submission
from xca_imaging.metadata.stored_query import FindDocuments, StoredQuery
from xca_imaging.registry.document_registry import Registry
from xca_imaging.registry.documents import Content
from xca_imaging.registry.provide import Repository
from xca_imaging.registry.submit import Registered
from xca_imaging.settings import Pacs
from xca_imaging.transactions.adhoc_query import QueryResponse
from xca_imaging.transactions.document_set import DocumentRequest, RetrieveResponse
from xca_imaging.transactions.imaging_document_set import RetrieveImagingRequest, SeriesRequest, StudyRequest
from xca_imaging.transactions.registry_response import RegistryResponse, response_to
from xca_imaging.wire import xml
from xca_imaging.wire.mtom import Reference

T = TypeVar("T")

PLAIN_SYNTAXES = (uids.EXPLICIT_VR_LITTLE_ENDIAN, uids.IMPLICIT_VR_LITTLE_ENDIAN)
"""What objects without pixels come in."""


class NodeRepository:
    """The registry and repository of this node, called without a message in between.

    Parameters
    ----------
    update : callable
        Does what ITI-57 does.
    executor : Executor
        For database and files.
    """

    def __init__(
        self,
        registry: Registry,
        repository: Repository | None,
        update: Callable[[Submission], Registered],
        executor: Executor,
    ) -> None:
        self._registry, self._repository, self._update, self._executor = registry, repository, update, executor

    async def stored_query(self, query: StoredQuery) -> QueryResponse:
        def find() -> tuple[DocumentEntry, ...]:
            leaves = self._registry.query(query).fragments
            decoded = (ebrim.decode_object(xml.parse(leaf)) for leaf in leaves)
            return tuple(each for each in decoded if isinstance(each, DocumentEntry))

        try:
            found = await self._run(find)
        except RegistryError as exc:
            return QueryResponse(uids.STATUS_FAILURE, (exc,))
        return QueryResponse(uids.STATUS_SUCCESS, (), Submission(documents=found))

    async def current_patient_id(self, patient_id: str) -> str:
        return await self._run(lambda: self._registry.current_patient_id(patient_id))

    async def retrieve_document(self, repository_unique_id: str, document_unique_id: str) -> bytes:
        repository = self._repository
        if repository is None or repository_unique_id != repository.repository_unique_id:
            raise UnknownRepositoryId(f"{repository_unique_id} is not a repository here", document_unique_id)

        def read() -> bytes:
            stored = repository.find(document_unique_id)
            if stored is None:
                raise DocumentUniqueIdError("no such document in this repository", document_unique_id)
            return stored.path.read_bytes()

        return await self._run(read)

    async def provide_and_register(self, submission: Submission, documents: Mapping[str, bytes]) -> RegistryResponse:
        repository = self._repository
        if repository is None:
            raise NotPublished("this node stores no documents: set repository.unique_id, or publish.repository")
        contents = {entry: Content.of(content) for entry, content in documents.items()}
        return await self._submit(lambda: repository.provide(submission, contents))

    async def update(self, submission: Submission) -> RegistryResponse:
        return await self._submit(lambda: self._update(submission))

    async def _submit(self, work: Callable[[], Registered]) -> RegistryResponse:
        try:
            return response_to((await self._run(work)).warnings)
        except SubmissionRefused as exc:
            return response_to(exc.errors)

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)


class SoapRepository:
    """A registry and a repository by their endpoints."""

    def __init__(self, client: SoapClient, registry: Endpoint, repository: Endpoint) -> None:
        self._client, self._registry, self._repository = client, registry, repository

    async def stored_query(self, query: StoredQuery) -> QueryResponse:
        return await self._client.stored_query(self._registry, query)

    async def current_patient_id(self, patient_id: str) -> str:
        return patient_id

    async def retrieve_document(self, repository_unique_id: str, document_unique_id: str) -> bytes:
        wanted = DocumentRequest(None, repository_unique_id, document_unique_id)
        response, contents = await self._client.retrieve_documents(self._repository, [wanted])
        if document_unique_id not in contents:
            errors: tuple[RegistryError, ...] = response.registry.errors
            raise errors[0] if errors else DocumentUniqueIdError("the answer does not hold it", document_unique_id)
        return contents[document_unique_id]

    async def provide_and_register(self, submission: Submission, documents: Mapping[str, bytes]) -> RegistryResponse:
        return await self._client.provide_and_register(self._repository, submission, documents)

    async def update(self, submission: Submission) -> RegistryResponse:
        return await self._client.update_document_set(self._registry, submission)


class RepositoryElsewhere:
    """A RAD-68 endpoint of another system, of which nothing else is known.

    What it accepted is remembered here, so that a change can replace it. Should it register in this node's registry,
    that is asked as well, and its answer counts. RAD-68 cannot take a document back without another in its place.
    """

    def __init__(self, client: SoapClient, endpoint: Endpoint, own: PublishingRepository, memory: Publications) -> None:
        self._client, self._endpoint, self._own, self._memory = client, endpoint, own, memory

    async def stored_query(self, query: StoredQuery) -> QueryResponse:
        asked = query.query
        assert isinstance(asked, FindDocuments)
        response = await self._own.stored_query(query)
        here = {entry.unique_id for entry in response.objects.documents}
        formats = {(code.code, code.scheme) for code in asked.format_codes}
        there = [
            entry
            for references in asked.reference_ids
            for reference in references
            for entry in await asyncio.to_thread(self._memory.sent, self._endpoint.url, reference)
            if entry.patient_id == asked.patient_id
            and entry.unique_id not in here
            and (not formats or (entry.format_code and (entry.format_code.code, entry.format_code.scheme) in formats))
        ]
        objects = replace(response.objects, documents=(*response.objects.documents, *there))
        return replace(response, objects=objects)

    async def current_patient_id(self, patient_id: str) -> str:
        return patient_id

    async def retrieve_document(self, repository_unique_id: str, document_unique_id: str) -> bytes:
        content = await asyncio.to_thread(self._memory.sent_content, self._endpoint.url, document_unique_id)
        if content is not None:
            return content
        wanted = DocumentRequest(None, repository_unique_id, document_unique_id)
        _, contents = await self._client.retrieve_documents(self._endpoint, [wanted])
        if document_unique_id not in contents:
            raise DocumentUniqueIdError(f"{self._endpoint.url} does not give it back", document_unique_id)
        return contents[document_unique_id]

    async def provide_and_register(self, submission: Submission, documents: Mapping[str, bytes]) -> RegistryResponse:
        response = await self._client.provide_and_register(self._endpoint, submission, documents)
        if response.succeeded:
            sent = [Sent(entry, documents[entry.entry_uuid]) for entry in submission.documents]
            replaced = [each.target for each in submission.associations if each.type == uids.RPLC]
            await asyncio.to_thread(self._memory.keep_sent, self._endpoint.url, sent, replaced)
        return response

    async def update(self, submission: Submission) -> RegistryResponse:
        entries = ", ".join(each.target for each in submission.associations)
        raise NotPublished(f"RAD-68 cannot withdraw a document: have {entries} deprecated at {self._endpoint.url}")


class TransferredObjects:
    """Objects of the PACSs of this node, through its own transfers."""

    def __init__(self, transfers: Transfers) -> None:
        self._transfers = transfers

    async def fetch(self, wants: Sequence[Want], max_bytes: int) -> Mapping[str, bytes]:
        async with self._transfers.fetch(wants, accept=PLAIN_SYNTAXES, asker="publishing") as transfer:
            await transfer.wait()
            for want, error in transfer.ledger.outcome().failed:
                raise error.at(want.sop_instance_uid)
            held = {want.sop_instance_uid: transfer.held(want) for want in wants}
            if sum(instance.size for instance in held.values()) > max_bytes:
                raise RepositoryOutOfResources(f"the objects have more than {max_bytes} bytes")

            def read(path: Path) -> bytes:
                return path.read_bytes()

            return {uid: await asyncio.to_thread(read, instance.path) for uid, instance in held.items()}


class TransfersFinder:
    """A PACS as the transfers of this node ask it: within its associations, one slot for each call."""

    def __init__(self, transfers: Transfers, pacs: Pacs) -> None:
        self._transfers, self._pacs = transfers, pacs.name

    async def find_studies(
        self,
        *,
        study_instance_uid: str = "",
        patient_id: str = "",
        since: date | None = None,
        until: date | None = None,
    ) -> list[StudyFacts]:
        async with self._transfers.queries(self._pacs) as queries:
            return await queries.find_studies(
                study_instance_uid=study_instance_uid, patient_id=patient_id, since=since, until=until
            )

    async def find_series(self, study_instance_uid: str, *, patient_id: str = "") -> list[SeriesFacts]:
        async with self._transfers.queries(self._pacs) as queries:
            return await queries.find_series(study_instance_uid, patient_id=patient_id)

    async def read_study(self, study_instance_uid: str) -> StudyContents:
        async with self._transfers.queries(self._pacs) as queries:
            return await queries.read_study(study_instance_uid)


class RetrievedObjects:
    """Objects of the PACSs of a node, by RAD-69."""

    def __init__(self, client: SoapClient, endpoint: Endpoint) -> None:
        self._client, self._endpoint = client, endpoint

    async def fetch(self, wants: Sequence[Want], max_bytes: int) -> Mapping[str, bytes]:
        request = RetrieveImagingRequest(
            tuple(
                StudyRequest(
                    want.study_instance_uid,
                    (
                        SeriesRequest(
                            want.series_instance_uid,
                            (DocumentRequest(None, want.repository_unique_id, want.sop_instance_uid),),
                        ),
                    ),
                )
                for want in wants
            ),
            PLAIN_SYNTAXES,
        )
        sinks: dict[str, MemorySink] = {}
        answers: list[RetrieveResponse] = []

        def new_sink(content_id: str, content_type: str) -> MemorySink:
            sinks[content_id] = MemorySink(max_bytes)
            return sinks[content_id]

        await self._client.retrieve_imaging(self._endpoint, request, new_sink, answers.append)
        found = {}
        for document in answers[0].documents:
            content = document.content
            if isinstance(content, Reference):
                content = sinks[content.content_id].content if content.content_id in sinks else b""
            found[document.document_unique_id] = content
        for want in wants:
            if not found.get(want.sop_instance_uid):
                errors = answers[0].registry.errors
                raise errors[0] if errors else RepositoryError("the answer leaves it out", want.sop_instance_uid)
        return found
