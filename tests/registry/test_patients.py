"""Identity feeds: who is known, merges and their chains, and what becomes of documents."""

from __future__ import annotations

import pytest
from sqlalchemy import select

from tests.registry.samples import AUTHORITY, HOME, OTHER_PATIENT, PATIENT, decoded, document, folder, into_folder
from tests.registry.samples import submission as submission_of
from tests.registry.test_concurrency import at_once
from xca_imaging import errors, uids
from xca_imaging.metadata.model import DocumentEntry, SubmissionSet
from xca_imaging.metadata.stored_query import FindDocuments, GetAll, StoredQuery
from xca_imaging.registry import Registry, events
from xca_imaging.registry.administration import Administration
from xca_imaging.registry.events import Requester
from xca_imaging.registry.tables import ObjectRow
from xca_imaging.transactions.identity_feed import Added, Feed, FeedMessage, FeedRefused, Merged, Revised

FEED = Requester("adt", "urn:uuid:1")
A, B, C, D = (f"{name}^^^&{AUTHORITY}&ISO" for name in "ABCD")
FOREIGN = "A^^^&1.2.3.4&ISO"


@pytest.fixture
def administration(registry: Registry) -> Administration:
    return Administration(registry)


def told(administration: Administration, *feeds: Feed) -> None:
    for number, feed in enumerate(feeds):
        administration.feed(FeedMessage(f"message-{number}", feed), "ITI-8", FEED)


def documents_of(registry: Registry, patient_id: str) -> list[DocumentEntry]:
    query = FindDocuments(patient_id=patient_id, status=(uids.APPROVED, uids.DEPRECATED))
    found = decoded(registry.query(StoredQuery(query)).fragments)
    assert all(isinstance(each, DocumentEntry) and each.patient_id == patient_id for each in found)
    return found  # type: ignore[return-value]


def register(registry: Registry, patient_id: str) -> DocumentEntry:
    entry = document(patient_id=patient_id, source_patient_info=("PID-5|Sample^Ada",))
    registry.register(submission_of(entry, patient_id=patient_id))
    return entry


def read_events(registry: Registry) -> list[events.Event]:
    with registry.database.reading() as connection:
        return [event for _, event in events.read(connection)]


def test_strict_patients_are_those_that_a_feed_has_told_of(url: str) -> None:
    registry = Registry.open(url, home_community_id=HOME, strict_patients=True)
    with pytest.raises(errors.SubmissionRefused) as refused:
        register(registry, PATIENT)
    assert [each.code for each in refused.value.errors] == ["XDSUnknownPatientId"]
    told(Administration(registry), Added((PATIENT,)), Revised((OTHER_PATIENT,)))
    register(registry, PATIENT)
    register(registry, OTHER_PATIENT)  # a registry that missed the add learns of the patient by the revision
    registry.close()


def test_documents_of_a_subsumed_id_answer_under_the_surviving_one(
    registry: Registry, administration: Administration
) -> None:
    first, second = register(registry, A), register(registry, B)
    told(administration, Merged((B,), (A,)))
    assert documents_of(registry, A) == []
    found = documents_of(registry, B)
    assert {each.unique_id for each in found} == {first.unique_id, second.unique_id}
    # What the source said of its patient is not touched.
    assert {each.source_patient_id for each in found} == {first.source_patient_id}
    assert {each.source_patient_info for each in found} == {first.source_patient_info}


def test_submission_sets_folders_and_associations_move_too(registry: Registry, administration: Administration) -> None:
    entry, kept = document(patient_id=A), folder(patient_id=A)
    registry.register(
        submission_of(
            entry,
            folders=[kept],
            associations=into_folder(kept.entry_uuid, entry.entry_uuid),
            patient_id=A,
        )
    )
    told(administration, Merged((B,), (A,)))
    status = (uids.APPROVED,)
    query = GetAll(patient_id=B, document_status=status, submission_set_status=status, folder_status=status)
    found = decoded(registry.query(StoredQuery(query)).fragments)
    assert len(found) == 7  # SubmissionSet, DocumentEntry, Folder, four associations
    assert {each.patient_id for each in found if not hasattr(each, "source")} == {B}
    assert sum(isinstance(each, SubmissionSet) for each in found) == 1


def test_a_chain_of_merges_ends_at_the_one_that_is_left(registry: Registry, administration: Administration) -> None:
    for patient_id in (A, B, C):
        register(registry, patient_id)
    told(administration, Merged((B,), (A,)), Merged((C,), (B,)))
    assert len(documents_of(registry, C)) == 3
    # Naming an id that has been given up since means the one that it went to.
    register(registry, D)
    told(administration, Merged((A,), (D,)))
    assert len(documents_of(registry, C)) == 4
    # What has been done already changes nothing, and is told of all the same.
    told(administration, Merged((B,), (A,)), Merged((C,), (A,)), Merged((C,), (B,)))
    assert len(documents_of(registry, C)) == 4
    assert [each.facts["relinked"] for each in read_events(registry)] == ["2", "4", "2", "0", "0", "0"]


def test_several_domains_in_one_merge(registry: Registry, administration: Administration) -> None:
    register(registry, A)
    register(registry, FOREIGN)
    told(administration, Merged((B, "B^^^&1.2.3.4&ISO"), (A, FOREIGN)))
    assert len(documents_of(registry, B)) == 1
    assert len(documents_of(registry, "B^^^&1.2.3.4&ISO")) == 1


REFUSED: list[tuple[list[Feed], Feed]] = [
    ([], Merged((A,), (A,))),
    ([Merged((B,), (A,))], Merged((A,), (B,))),  # the survivor went into the one that is to go
    ([Merged((B,), (A,)), Merged((C,), (B,))], Merged((A,), (C,))),
    ([Merged((B,), (A,))], Merged((C,), (A,))),  # gone elsewhere already
    ([Merged((B,), (A,))], Added((A,))),  # a feed for an id that was given up
    ([], Merged((B,), (FOREIGN,))),
]


@pytest.mark.parametrize(("before", "feed"), REFUSED)
def test_merges_that_cannot_be(
    registry: Registry, administration: Administration, before: list[Feed], feed: Feed
) -> None:
    told(administration, *before)
    entry = register(registry, D)
    with pytest.raises(FeedRefused):
        told(administration, feed)
    assert [each.unique_id for each in documents_of(registry, D)] == [entry.unique_id]


def test_a_refused_merge_of_two_leaves_both(registry: Registry, administration: Administration) -> None:
    register(registry, A)
    with pytest.raises(FeedRefused):
        told(administration, Merged((B,), (A, B)))
    assert len(documents_of(registry, A)) == 1


def test_a_revision_of_a_subsumed_id_brings_it_not_back(registry: Registry, administration: Administration) -> None:
    told(administration, Merged((B,), (A,)), Revised((A,)))
    with pytest.raises(errors.SubmissionRefused) as refused:
        register(registry, A)
    assert [each.code for each in refused.value.errors] == ["XDSUnknownPatientId"]
    assert B in str(refused.value)
    register(registry, B)


def test_only_domains_that_the_registry_takes(url: str) -> None:
    registry = Registry.open(url, home_community_id=HOME, assigning_authorities=[AUTHORITY], strict_patients=True)
    administration = Administration(registry)
    told(administration, Added((FOREIGN, A)))
    register(registry, A)
    with pytest.raises(FeedRefused, match="assigning authority"):
        told(administration, Added((FOREIGN,)))
    registry.close()


def test_a_merge_among_submissions_leaves_nothing_behind(registry: Registry, administration: Administration) -> None:
    def attempt(number: int) -> str:
        if number == 0:
            told(administration, Merged((B,), (A,)))
            return "merged"
        try:
            for _ in range(5):
                register(registry, A)
        except errors.SubmissionRefused as problem:
            return ",".join(each.code for each in problem.errors)
        return "registered"

    assert set(at_once(attempt)) <= {"merged", "registered", "XDSUnknownPatientId"}
    assert documents_of(registry, A) == []
    with registry.database.reading() as connection:
        assert set(connection.scalars(select(ObjectRow.patient_id))) <= {B}


def test_feeds_leave_events(registry: Registry, administration: Administration) -> None:
    register(registry, A)
    told(administration, Added((B,)), Merged((B,), (A,)))
    with pytest.raises(FeedRefused):
        told(administration, Merged((A,), (B,)))
    found = read_events(registry)
    assert [(each.transaction, each.action, each.outcome) for each in found] == [
        ("ITI-8", "add", "success"),
        ("ITI-8", "merge", "success"),
        ("ITI-8", "merge", "refused"),
    ]
    assert {each.caller for each in found} == {"adt"}
    assert (found[1].patient_id, found[1].objects) == (B, (A,))
    assert found[1].facts == {"source_message_id": "message-1", "relinked": "2"}  # DocumentEntry, SubmissionSet
    assert "itself" in found[2].facts["reason"]
    assert found[0].time == "20240301083015"
