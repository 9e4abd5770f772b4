"""ITI-62: what may be removed and what not."""

from __future__ import annotations

import pytest
from sqlalchemy import func, select

from tests.registry.samples import PATIENT, association, decoded, document, folder, into_folder, submission
from tests.registry.test_patients import read_events
from xca_imaging import errors, uids
from xca_imaging.metadata.model import RegistryObject
from xca_imaging.metadata.stored_query import GetAll, StoredQuery
from xca_imaging.registry import Registry
from xca_imaging.registry.administration import Administration
from xca_imaging.registry.events import Requester
from xca_imaging.registry.tables import Base, EventRow, PatientRow, StoredDocumentRow

ADMINISTRATOR = Requester("administrator")


@pytest.fixture
def administration(registry: Registry) -> Administration:
    return Administration(registry)


def stored(registry: Registry) -> list[RegistryObject]:
    both = (uids.APPROVED, uids.DEPRECATED)
    query = GetAll(patient_id=PATIENT, document_status=both, submission_set_status=both, folder_status=both)
    return decoded(registry.query(StoredQuery(query)).fragments)


def rows(registry: Registry) -> int:
    """Count the rows of all tables that hold objects."""
    others = {each.__tablename__ for each in (EventRow, PatientRow, StoredDocumentRow)}
    with registry.database.reading() as connection:
        return sum(
            connection.scalar(select(func.count()).select_from(table)) or 0
            for table in Base.metadata.sorted_tables
            if table.name not in others
        )


def refused(administration: Administration, ids: list[str]) -> list[str]:
    with pytest.raises(errors.SubmissionRefused) as raised:
        administration.remove(ids, ADMINISTRATOR)
    return [each.code for each in raised.value.errors]


def test_a_whole_submission_leaves_no_row(registry: Registry, administration: Administration) -> None:
    entry, kept = document(reference_ids=("1.2^^^^urn:ihe:iti:xds:2016:studyInstanceUID",)), folder()
    registry.register(submission(entry, folders=[kept], associations=into_folder(kept.entry_uuid, entry.entry_uuid)))
    administration.remove([each.entry_uuid for each in stored(registry)], ADMINISTRATOR)
    assert rows(registry) == 0
    registry.register(submission(entry))  # as if it had never been there


def test_an_object_that_an_association_names(registry: Registry, administration: Administration) -> None:
    names = registry.register(submission(document(entry_uuid="Document"))).entry_uuids
    before = rows(registry)
    assert refused(administration, [names["SubmissionSet"]]) == ["ReferencesExistException"]
    assert refused(administration, [names["Document"]]) == ["ReferencesExistException"]
    assert rows(registry) == before


def test_what_would_be_left_without_any_association(registry: Registry, administration: Administration) -> None:
    names = registry.register(submission(document(entry_uuid="Document"))).entry_uuids
    (membership,) = (each.entry_uuid for each in stored(registry) if hasattr(each, "source"))
    assert refused(administration, [names["Document"], membership]) == ["XDSUnreferencedObjectException"]
    assert refused(administration, [names["SubmissionSet"], membership]) == ["XDSUnreferencedObjectException"]
    assert refused(administration, [membership]) == ["XDSUnreferencedObjectException"] * 2
    administration.remove([names["Document"], membership, names["SubmissionSet"]], ADMINISTRATOR)
    assert rows(registry) == 0


def test_a_document_taken_out_of_a_folder(registry: Registry, administration: Administration) -> None:
    memberships = into_folder("Folder", "Document", entry_uuid="Membership")
    names = registry.register(
        submission(document(entry_uuid="Document"), folders=[folder(entry_uuid="Folder")], associations=memberships)
    ).entry_uuids
    by_submission = names[memberships[1].entry_uuid]
    assert refused(administration, [names["Membership"]]) == ["ReferencesExistException"]
    administration.remove([names["Membership"], by_submission], ADMINISTRATOR)
    assert {type(each).__name__ for each in stored(registry)} >= {"DocumentEntry", "Folder", "SubmissionSet"}


def test_a_replaced_document_is_named_by_its_replacement(registry: Registry, administration: Administration) -> None:
    old = registry.register(submission(document(entry_uuid="Old"))).entry_uuids
    registry.register(submission(document(entry_uuid="New"), associations=[association(uids.RPLC, "New", old["Old"])]))
    membership = next(
        each.entry_uuid for each in stored(registry) if getattr(each, "source", "") == old["SubmissionSet"]
    )
    ids = [old["Old"], old["SubmissionSet"], membership]
    assert refused(administration, ids) == ["ReferencesExistException"]
    replacement = next(each.entry_uuid for each in stored(registry) if getattr(each, "type", "") == uids.RPLC)
    administration.remove([*ids, replacement], ADMINISTRATOR)
    assert [type(each).__name__ for each in stored(registry)] == ["SubmissionSet", "DocumentEntry", "Association"]


def test_what_is_not_there(registry: Registry, administration: Administration) -> None:
    names = registry.register(submission(document())).entry_uuids
    unknown = "urn:uuid:08a15a6f-5b4a-42de-8f95-89474f83abdf"
    assert refused(administration, [unknown, names["SubmissionSet"]]) == ["UnresolvedReferenceException"]


def test_removals_leave_events(registry: Registry, administration: Administration) -> None:
    entry = document()
    registry.register(submission(entry))
    ids = [each.entry_uuid for each in stored(registry)]
    refused(administration, ids[:1])
    administration.remove(ids, ADMINISTRATOR)
    kept, done = read_events(registry)
    assert (kept.transaction, kept.outcome, kept.facts["reason"]) == ("ITI-62", "refused", "ReferencesExistException")
    assert (done.outcome, done.patient_id, done.caller) == ("success", PATIENT, "administrator")
    assert set(done.objects) == set(ids)
    assert done.facts["documents"] == entry.unique_id
