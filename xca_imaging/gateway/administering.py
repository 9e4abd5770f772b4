"""What administrators and identity sources ask of this node: ITI-44, ITI-57, ITI-61, ITI-62 and ITI-86.

References
----------
* IHE ITI TF-2, 3.44, 3.61; IHE ITI XDS Metadata Update, 3.57; IHE ITI Remove Metadata and Documents, 3.62, 3.86
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from datetime import UTC, datetime
from functools import partial
from typing import TypeVar

from lxml import etree

from xca_imaging.errors import RegistryError, RepositoryError, UnknownRepositoryId
from xca_imaging.gateway.documents import requester_of
from xca_imaging.gateway.exchange import Answer, Context, Operation
from xca_imaging.metadata.model import Submission
from xca_imaging.registry.administration import Administration
from xca_imaging.registry.provide import Repository
from xca_imaging.transactions import iti44, iti57, iti61, iti62, iti86
from xca_imaging.transactions.document_set import RetrieveRequest
from xca_imaging.transactions.identity_feed import FeedRefused
from xca_imaging.transactions.registry_response import response_to

T = TypeVar("T")


class AdministrativeActors:
    """Metadata updates and removals, on-demand entries and identity feeds at the endpoints of registry and repository.

    Database and files are used in `executor`, never on the event loop.
    """

    def __init__(self, administration: Administration, repository: Repository | None, executor: Executor) -> None:
        self._administration, self._repository, self._executor = administration, repository, executor

    def registry_operations(self) -> Sequence[Operation]:
        return (
            *(
                Operation(transaction, partial(iti44.decode_request, transaction), self._feed, _refuse_feed)
                for transaction in iti44.TRANSACTIONS
            ),
            Operation(iti57.TRANSACTION, iti57.decode_request, self._update, _refuse),
            Operation(iti61.TRANSACTION, iti61.decode_request, self._register_on_demand, _refuse),
            Operation(iti62.TRANSACTION, iti62.decode_request, self._remove_metadata, _refuse),
        )

    def repository_operations(self) -> Sequence[Operation]:
        return (Operation(iti86.TRANSACTION, iti86.decode_request, self._remove_documents, _refuse),)

    async def _run(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, call)

    async def _feed(self, request: iti44.Request, context: Context) -> Answer:
        try:
            await self._run(partial(self._administration.feed, request.message, "ITI-44", requester_of(context)))
        except (FeedRefused, RegistryError) as exc:
            return Answer(_acknowledge(request, str(exc)))
        return Answer(_acknowledge(request))

    async def _update(self, submission: Submission, context: Context) -> Answer:
        registered = await self._run(partial(self._administration.update, submission, requester_of(context)))
        return Answer(iti57.encode_response(response_to(registered.warnings)))

    async def _register_on_demand(self, submission: Submission, context: Context) -> Answer:
        register = partial(self._administration.register_on_demand, submission, requester_of(context))
        return Answer(iti61.encode_response(response_to((await self._run(register)).warnings)))

    async def _remove_metadata(self, request: iti62.RemoveRequest, context: Context) -> Answer:
        await self._run(partial(self._administration.remove, request.entry_uuids, requester_of(context)))
        return Answer(iti62.encode_response(response_to()))

    async def _remove_documents(self, request: RetrieveRequest, context: Context) -> Answer:
        if self._repository is None:
            raise RepositoryError("this node stores no documents: its repository.unique_id is not set")
        removed = 0
        failed: list[RegistryError] = []
        for document in dict.fromkeys(request.documents):
            unique_id = document.document_unique_id
            try:
                if document.repository_unique_id != self._repository.repository_unique_id:
                    raise UnknownRepositoryId(f"{document.repository_unique_id} is not a repository here", unique_id)
                remove = partial(self._administration.remove_document, self._repository)
                await self._run(partial(remove, unique_id, requester_of(context)))
                removed += 1
            except RegistryError as exc:
                failed.append(exc.at(unique_id))
        return Answer(iti86.encode_response(response_to(failed, found=removed)))


def _refuse(errors: Sequence[RegistryError]) -> etree._Element:
    """Return the RegistryResponse of a request that changed nothing."""
    return iti57.encode_response(response_to(errors))


def _refuse_feed(errors: Sequence[RegistryError]) -> etree._Element:
    """Return the acknowledgement of a message of which not even the id is known."""
    return _acknowledge(None, "; ".join(map(str, errors)))


def _acknowledge(request: iti44.Request | None, reason: str = "") -> etree._Element:
    now = datetime.now(UTC).strftime("%Y%m%d%H%M%S+0000")
    return iti44.encode_response(request, message_id=str(uuid.uuid4()).upper(), creation_time=now, reason=reason)
