"""A stored query's answer: what it selects, in one state of the registry, and its XML as the answer goes out.

The XML of LeafClass answers is read page by page, whole and never parsed, so that an answer of any length needs the
memory of one page. The first page is read in the same state as the selection: what fits in it is one state of the
registry. Later pages show each object as it is when it is read; one that was removed meanwhile is left out.

References
----------
* IHE ITI TF-2, 3.18.4.1.2.3.7 (the queries), 3.18.4.1.3 (errors)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, select

from xca_imaging import errors
from xca_imaging.metadata import ebrim
from xca_imaging.metadata.model import ObjectRef
from xca_imaging.metadata.stored_query import StoredQuery
from xca_imaging.registry.database import Database, chunks
from xca_imaging.registry.selection import Selection
from xca_imaging.registry.tables import Kind, ObjectRow
from xca_imaging.wire import xml

PAGE = 100
"""Objects whose XML is read at a time: some 600 KB, read in 2 ms."""


class Leaves:
    """The XML of the objects of a LeafClass answer, in order, read from the database as it is asked for."""

    # Mutable state: none; what is not in `first` is read again by each iteration.

    def __init__(self, database: Database, numbers: Sequence[int], first: Sequence[bytes]) -> None:
        self._database, self._numbers, self._first = database, numbers, first

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[bytes]:
        for page in self.pages():
            yield from page

    def pages(self) -> Iterator[Sequence[bytes]]:
        """Yield the elements, UTF-8 with their own namespace declarations, at most `PAGE` at a time."""
        yield self._first
        for numbers in chunks(self._numbers[PAGE:], PAGE):
            with self._database.reading() as connection:
                page = _read(connection, numbers)
            yield page


@dataclass(frozen=True, slots=True)
class Found:
    """The objects that a query selects, as it asked for them: their XML (LeafClass) or references (ObjectRef)."""

    fragments: Leaves | tuple[()] = ()
    refs: tuple[ObjectRef, ...] = ()

    def pages(self) -> Iterator[Sequence[bytes]]:
        """Yield objects or references as serialised elements, a bounded number at a time."""
        if isinstance(self.fragments, Leaves):
            yield from self.fragments.pages()
        for refs in chunks(self.refs):
            yield [xml.serialize(ebrim.encode_reference(ref)) for ref in refs]


def search(database: Database, request: StoredQuery, *, home_community_id: str, max_results: int) -> Found:
    """Return what a stored query finds.

    Parameters
    ----------
    max_results : int
        Most objects of a LeafClass answer, 0 for no limit. References are not limited.

    Raises
    ------
    errors.TooManyResults
        More LeafClass objects than that: none is returned, the caller narrows the query or asks for references.
    errors.ResultNotSinglePatient
        A LeafClass answer by ids would mix patients.
    errors.StoredQueryParamNumber
        More of something than the limits of `conditions`.
    """
    leaves = request.return_type == "LeafClass"
    with database.reading() as connection:
        rows = Selection(connection, max_results if leaves else 0).select(request.query)
        if not leaves:
            return Found(refs=tuple(ObjectRef(row.entry_uuid, home_community_id) for row in rows))
        if not request.names_patients:
            patients = {row.patient_id for row in rows if row.kind != Kind.ASSOCIATION}
            if len(patients) > 1:
                raise errors.ResultNotSinglePatient("the objects asked for belong to more than one patient")
        numbers = [int(row.id) for row in rows]
        return Found(Leaves(database, numbers, _read(connection, numbers[:PAGE])))


def _read(connection: Connection, numbers: Sequence[int]) -> Sequence[bytes]:
    statement = select(ObjectRow.id, ObjectRow.xml).where(ObjectRow.id.in_(numbers))
    found = {row.id: row.xml for row in connection.execute(statement)}
    return [found[number] for number in numbers if number in found]
