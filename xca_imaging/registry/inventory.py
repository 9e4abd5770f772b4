"""Everything of a kind that is registered, read a page at a time."""

from __future__ import annotations

from collections.abc import Iterator

from sqlalchemy import select

from xca_imaging import uids
from xca_imaging.metadata import ebrim
from xca_imaging.metadata.model import DocumentEntry
from xca_imaging.registry.document_registry import Registry
from xca_imaging.registry.tables import DocumentEntryRow, ObjectRow, Status
from xca_imaging.wire import xml

_PAGE = 500  # entries: some 3 MB of XML


def approved_manifests(registry: Registry) -> Iterator[DocumentEntry]:
    """Yield the approved entries of manifests of all patients, in the order of their registration.

    Each page is a transaction of its own: what is registered meanwhile may be there or not.
    """
    last = 0
    while True:
        statement = (
            select(ObjectRow.id, ObjectRow.xml)
            .join(DocumentEntryRow, DocumentEntryRow.id == ObjectRow.id)
            .where(
                ObjectRow.id > last,
                ObjectRow.status == Status.APPROVED,
                # The coding scheme of the SOP class is not always the right one in the field; the code tells.
                DocumentEntryRow.format_code.startswith(f"{uids.KOS_SOP_CLASS}^^", autoescape=True),
            )
            .order_by(ObjectRow.id)
            .limit(_PAGE)
        )
        with registry.database.reading() as connection:
            rows = connection.execute(statement).all()
        for number, leaf in rows:
            last = number
            entry = ebrim.decode_object(xml.parse(leaf))
            assert isinstance(entry, DocumentEntry)
            yield entry
        if len(rows) < _PAGE:
            return
