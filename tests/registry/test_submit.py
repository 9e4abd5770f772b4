"""What registering does, and what it refuses: each rule with its code."""

from __future__ import annotations

from dataclasses import replace

import pytest
from sqlalchemy import event, func, select, update

from tests.registry.conftest import NOW
from tests.registry.samples import (
    AUTHORITY,
    HOME,
    OTHER_PATIENT,
    PATIENT,
    association,
    decoded,
    document,
    folder,
    into_folder,
    new_uid,
    submission,
)
from xca_imaging import uids
from xca_imaging.errors import SubmissionRefused
from xca_imaging.metadata.model import (
    Association,
    DocumentEntry,
    Folder,
    RegistryObject,
    Slot,
    Submission,
    SubmissionSet,
)
from xca_imaging.metadata.stored_query import GetAll, StoredQuery
from xca_imaging.registry import Registry
from xca_imaging.registry.tables import Base, ObjectRow

ANY_STATUS = (uids.APPROVED, uids.DEPRECATED)


def everything(registry: Registry, patient_id: str = PATIENT) -> list[RegistryObject]:
    query = GetAll(
        patient_id=patient_id,
        document_status=ANY_STATUS,
        submission_set_status=ANY_STATUS,
        folder_status=ANY_STATUS,
        types=(uids.STABLE_DOCUMENT, uids.ON_DEMAND_DOCUMENT),
    )
    return decoded(registry.query(StoredQuery(query)).fragments)


def by_uuid(registry: Registry) -> dict[str, RegistryObject]:
    return {item.entry_uuid: item for item in everything(registry)}


def counts(registry: Registry) -> dict[str, int]:
    with registry.database.reading() as connection:
        return {
            table.name: connection.scalar(select(func.count()).select_from(table)) or 0
            for table in Base.metadata.sorted_tables
        }


def refusal(registry: Registry, refused: Submission, *, on_demand: bool = False) -> list[str]:
    """Submit what must be refused; return the codes, and make sure that it left no trace."""
    before = counts(registry), everything(registry)
    with pytest.raises(SubmissionRefused) as caught:
        registry.register(refused, on_demand=on_demand)
    assert (counts(registry), everything(registry)) == before
    return [error.code for error in caught.value.errors]


def register_one(registry: Registry, **changes: object) -> str:
    """Register one document; return its entryUUID."""
    entry = document(**changes)
    return registry.register(submission(entry, patient_id=entry.patient_id)).entry_uuids[entry.entry_uuid]


def relate(type_: str, target: str, **changes: object) -> tuple[Submission, str]:
    """Return a submission of a new document related to `target`, and the id of that document."""
    entry = document(**changes)
    related = submission(
        entry, associations=[association(type_, entry.entry_uuid, target)], patient_id=entry.patient_id
    )
    return related, entry.entry_uuid


# --- What the registry sets -------------------------------------------------------------------------------------------


def test_what_was_submitted_comes_back_with_what_the_registry_sets(registry: Registry) -> None:
    entry = document(title="Chest <CT> & more", extra_slots=(Slot("urn:example:kept", ("a", "b")),))
    sent = submission(entry)
    registered = registry.register(sent)
    assert registered.warnings == ()

    found = by_uuid(registry)
    entry_uuid = registered.entry_uuids[entry.entry_uuid]
    assert found[entry_uuid] == replace(
        entry,
        entry_uuid=entry_uuid,
        logical_id=entry_uuid,
        home_community_id=HOME,
        availability_status=uids.APPROVED,
    )
    assert all(item.home_community_id == HOME for item in found.values())
    assert all(item.logical_id == item.entry_uuid for item in found.values())
    assert all(item.availability_status == uids.APPROVED for item in found.values())
    [member] = [item for item in found.values() if isinstance(item, Association)]
    assert (member.source, member.target) == (registered.entry_uuids["SubmissionSet"], entry_uuid)


def test_uuids_of_the_message_are_kept_and_symbolic_ids_replaced(registry: Registry) -> None:
    chosen = "urn:uuid:0f0f0f0f-1111-4222-8333-444444444444"
    registered = registry.register(submission(document(entry_uuid=chosen)))
    assert registered.entry_uuids[chosen] == chosen
    symbolic = registered.entry_uuids["SubmissionSet"]
    assert symbolic.startswith("urn:uuid:")
    assert set(by_uuid(registry)) == set(registered.entry_uuids.values())


def test_a_submission_of_many_documents_is_registered_whole(registry: Registry) -> None:
    entries = [document() for _ in range(1200)]  # more than one batch of every kind
    registry.register(submission(*entries))
    assert counts(registry)["document_entries"] == 1200
    assert counts(registry)["associations"] == 1200


# --- Structure --------------------------------------------------------------------------------------------------------


def test_a_batch_takes_few_statements(registry: Registry) -> None:
    """Their number grows with chunks of it, not with its documents."""
    statements: list[str] = []

    def note(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        statements.append(statement)

    with registry.database.reading() as connection:
        engine = connection.engine
    event.listen(engine, "before_cursor_execute", note)
    counts = []
    for size in (100, 2000):
        statements.clear()
        registry.register(submission(*(document() for _ in range(size))))
        counts.append(len(statements))
    event.remove(engine, "before_cursor_execute", note)
    assert counts[0] < 30
    assert counts[1] < counts[0] + 40


def test_a_message_that_is_wrong_in_itself_is_refused(registry: Registry) -> None:
    entry = document(hash="", type_code=None)
    assert refusal(registry, submission(entry)) == ["XDSRegistryMetadataError", "XDSRegistryMetadataError"]


def test_a_document_outside_its_submission_set_is_refused(registry: Registry) -> None:
    stray = submission(document())
    assert refusal(registry, replace(stray, associations=())) == ["XDSRegistryMetadataError"]


def test_two_submission_sets_or_none_are_refused(registry: Registry) -> None:
    good = submission(document())
    second = replace(good.submission_sets[0], entry_uuid="Second", unique_id=new_uid())
    two = replace(good, submission_sets=(*good.submission_sets, second))
    assert refusal(registry, two) == ["XDSRegistryMetadataError"]
    assert "XDSRegistryMetadataError" in refusal(registry, Submission())


def test_an_on_demand_entry_needs_its_own_transaction(registry: Registry) -> None:
    entry = document(object_type=uids.ON_DEMAND_DOCUMENT, creation_time="", hash="", size=None)
    assert refusal(registry, submission(entry)) == ["XDSRegistryMetadataError"]
    registry.register(submission(entry), on_demand=True)


def test_an_id_that_is_registered_already_is_refused(registry: Registry) -> None:
    known = register_one(registry)
    assert refusal(registry, submission(document(entry_uuid=known))) == ["XDSRegistryMetadataError"]


# --- uniqueId ---------------------------------------------------------------------------------------------------------


def test_the_same_submission_again_is_refused(registry: Registry) -> None:
    sent = submission(document(), folders=[folder()])
    registry.register(sent)
    assert refusal(registry, sent) == ["XDSDuplicateUniqueIdInRegistry"] * 2


@pytest.mark.parametrize("first", ["submission set", "folder", "document"])
def test_the_unique_id_of_a_submission_set_may_not_be_any_other_objects(registry: Registry, first: str) -> None:
    used = new_uid()
    registry.register(
        {
            "submission set": submission(document(), unique_id=used),
            "folder": submission(folders=[folder(unique_id=used)]),
            "document": submission(document(unique_id=used)),
        }[first]
    )
    assert refusal(registry, submission(document(), unique_id=used)) == ["XDSDuplicateUniqueIdInRegistry"]
    assert refusal(registry, submission(folders=[folder(unique_id=used)])) == ["XDSDuplicateUniqueIdInRegistry"]


def test_a_document_may_not_have_the_unique_id_of_a_folder(registry: Registry) -> None:
    used = new_uid()
    registry.register(submission(folders=[folder(unique_id=used)]))
    assert refusal(registry, submission(document(unique_id=used))) == ["XDSDuplicateUniqueIdInRegistry"]


def test_the_same_document_twice_is_two_entries(registry: Registry) -> None:
    entry = document()
    first = registry.register(submission(entry)).entry_uuids[entry.entry_uuid]
    again = replace(entry, hash=entry.hash.upper())  # hashes compare case-insensitively
    second = registry.register(submission(again)).entry_uuids[entry.entry_uuid]
    assert first != second
    assert len([item for item in everything(registry) if isinstance(item, DocumentEntry)]) == 2


def test_another_document_under_a_known_unique_id_is_refused(registry: Registry) -> None:
    entry = document()
    registry.register(submission(entry))
    other = "a" * 40
    assert refusal(registry, submission(replace(entry, hash=other))) == ["XDSNonIdenticalHash"]
    assert refusal(registry, submission(replace(entry, size=7))) == ["XDSNonIdenticalSize"]
    both = submission(replace(entry, size=7, hash=other))
    assert refusal(registry, both) == ["XDSNonIdenticalHash", "XDSNonIdenticalSize"]
    with pytest.raises(SubmissionRefused) as caught:
        registry.register(both)
    assert [error.context for error in caught.value.errors] == [entry.unique_id, entry.unique_id]


# --- Patients ---------------------------------------------------------------------------------------------------------


def test_a_patient_of_a_foreign_domain_is_unknown(url: str) -> None:
    registry = Registry.open(url, home_community_id=HOME, assigning_authorities=[AUTHORITY])
    foreign = "test-1^^^&1.2.3.4.5&ISO"
    sent = submission(document(patient_id=foreign), patient_id=foreign)
    assert refusal(registry, sent) == ["XDSUnknownPatientId"]
    registry.register(submission(document()))
    registry.close()


def test_strict_patients_must_be_known_by_feed(url: str) -> None:
    registry = Registry.open(url, home_community_id=HOME, strict_patients=True)
    assert refusal(registry, submission(document())) == ["XDSUnknownPatientId"]
    registry.add_patients([PATIENT, PATIENT])
    registry.add_patients([PATIENT])
    registry.register(submission(document()))
    registry.close()


def test_objects_of_one_submission_have_one_patient(registry: Registry) -> None:
    assert refusal(registry, submission(document(patient_id=OTHER_PATIENT))) == ["XDSPatientIdDoesNotMatch"]


# --- Relationships ----------------------------------------------------------------------------------------------------

RELATIONSHIPS = [uids.RPLC, uids.XFRM_RPLC, uids.APND, uids.XFRM, uids.SIGNS]


@pytest.mark.parametrize("type_", RELATIONSHIPS)
def test_the_target_of_a_relationship_must_be_an_approved_document_of_the_patient(
    registry: Registry, type_: str
) -> None:
    nothing = "urn:uuid:00000000-1111-4222-8333-444444444444"
    assert refusal(registry, relate(type_, nothing)[0]) == ["UnresolvedReferenceException"]
    case = registry.register(submission(folders=[folder(entry_uuid="F")])).entry_uuids["F"]
    assert refusal(registry, relate(type_, case)[0]) == ["UnresolvedReferenceException"]

    known = register_one(registry)
    stranger, _ = relate(type_, known, patient_id=OTHER_PATIENT)
    assert refusal(registry, stranger) == ["XDSPatientIdDoesNotMatch"]

    registry.register(relate(type_, known)[0])
    replacement, _ = relate(uids.RPLC, known)
    if type_ in (uids.RPLC, uids.XFRM_RPLC):
        assert refusal(registry, replacement) == ["XDSRegistryDeprecatedDocumentError"]
    else:
        registry.register(replacement)
    assert refusal(registry, relate(type_, known)[0]) == ["XDSRegistryDeprecatedDocumentError"]


def test_the_source_of_a_relationship_must_be_in_the_submission(registry: Registry) -> None:
    first, second = register_one(registry), register_one(registry)
    sent = submission(document(), associations=[association(uids.APND, first, second)])
    assert refusal(registry, sent) == ["UnresolvedReferenceException"]


def test_documents_of_one_submission_may_be_related_but_not_replace_each_other(registry: Registry) -> None:
    report, signature = document(), document()
    signs = association(uids.SIGNS, signature.entry_uuid, report.entry_uuid)
    replaces = association(uids.RPLC, signature.entry_uuid, report.entry_uuid)
    assert refusal(registry, submission(report, signature, associations=[replaces])) == ["UnresolvedReferenceException"]
    registry.register(submission(report, signature, associations=[signs]))


def test_a_snapshot_is_of_an_on_demand_entry(registry: Registry) -> None:
    stable = register_one(registry)
    assert refusal(registry, relate(uids.IS_SNAPSHOT_OF, stable)[0]) == ["UnresolvedReferenceException"]
    entry = document(object_type=uids.ON_DEMAND_DOCUMENT, creation_time="", hash="", size=None)
    on_demand = registry.register(submission(entry), on_demand=True).entry_uuids[entry.entry_uuid]
    registry.register(relate(uids.IS_SNAPSHOT_OF, on_demand)[0])


@pytest.mark.parametrize("type_", [uids.RPLC, uids.XFRM_RPLC])
def test_replacing_deprecates_the_document_with_its_transformations_and_addenda(registry: Registry, type_: str) -> None:
    replaced = register_one(registry, title="replaced")
    outdated = {replaced}
    for relation in (uids.APND, uids.XFRM):
        sent, name = relate(relation, replaced)
        outdated.add(registry.register(sent).entry_uuids[name])
    sent, name = relate(uids.SIGNS, replaced)
    signature = registry.register(sent).entry_uuids[name]
    bystander = register_one(registry)

    sent, name = relate(type_, replaced)
    replacement = registry.register(sent).entry_uuids[name]

    status = {key: item.availability_status for key, item in by_uuid(registry).items()}
    assert {key for key, value in status.items() if value == uids.DEPRECATED} == outdated
    assert {status[key] for key in (replacement, bystander, signature)} == {uids.APPROVED}
    kept = by_uuid(registry)[replaced]
    assert isinstance(kept, DocumentEntry)
    assert kept.title == "replaced"  # only the status of its XML has changed


def test_a_refused_replacement_deprecates_nothing(registry: Registry) -> None:
    known = register_one(registry)
    sent, _ = relate(uids.RPLC, known)
    used = new_uid()
    registry.register(submission(document(), unique_id=used))
    refused = replace(sent, submission_sets=(replace(sent.submission_sets[0], unique_id=used),))
    assert refusal(registry, refused) == ["XDSDuplicateUniqueIdInRegistry"]
    assert by_uuid(registry)[known].availability_status == uids.APPROVED


def test_all_that_is_wrong_is_named_at_once(registry: Registry) -> None:
    nothing = "urn:uuid:00000000-1111-4222-8333-444444444444"
    used = new_uid()
    registry.register(submission(document(), unique_id=used))
    sent, _ = relate(uids.RPLC, nothing)
    sent = replace(sent, submission_sets=(replace(sent.submission_sets[0], unique_id=used),))
    assert refusal(registry, sent) == ["XDSDuplicateUniqueIdInRegistry", "UnresolvedReferenceException"]


def test_errors_name_objects_as_the_submitter_did(registry: Registry) -> None:
    nothing = "urn:uuid:00000000-1111-4222-8333-444444444444"
    sent, _ = relate(uids.APND, nothing)
    with pytest.raises(SubmissionRefused) as caught:
        registry.register(sent)
    [error] = caught.value.errors
    assert sent.associations[-1].entry_uuid in error.context
    assert nothing in error.context


# --- Membership -------------------------------------------------------------------------------------------------------


def test_a_submission_set_refers_to_registered_documents(registry: Registry) -> None:
    known = register_one(registry)
    reference = association(uids.HAS_MEMBER, "SubmissionSet", known, submission_set_status="Reference")
    registry.register(submission(document(), associations=[reference]))
    child = register_one(registry, patient_id=OTHER_PATIENT)  # mother and child: allowed by reference
    registry.register(submission(document(), associations=[replace(reference, target=child)]))
    nothing = "urn:uuid:00000000-1111-4222-8333-444444444444"
    lost = submission(document(), associations=[replace(reference, target=nothing)])
    assert refusal(registry, lost) == ["UnresolvedReferenceException"]


def test_members_belong_to_a_submission_set_or_a_folder(registry: Registry) -> None:
    known, entry = register_one(registry), document()
    sent = submission(entry, associations=[association(uids.HAS_MEMBER, known, entry.entry_uuid)])
    assert refusal(registry, sent) == ["UnresolvedReferenceException"]
    submitted = next(item for item in everything(registry) if isinstance(item, SubmissionSet)).entry_uuid
    sent = submission(entry, associations=[association(uids.HAS_MEMBER, submitted, entry.entry_uuid)])
    assert refusal(registry, sent) == ["UnresolvedReferenceException"]


def test_a_submission_set_cannot_hold_another_patients_folder_or_another_submission_set(registry: Registry) -> None:
    case = folder(patient_id=OTHER_PATIENT)
    ids = registry.register(submission(folders=[case], patient_id=OTHER_PATIENT)).entry_uuids
    sent = submission(document(), associations=[association(uids.HAS_MEMBER, "SubmissionSet", ids[case.entry_uuid])])
    assert refusal(registry, sent) == ["XDSPatientIdDoesNotMatch"]
    sent = submission(document(), associations=[association(uids.HAS_MEMBER, "SubmissionSet", ids["SubmissionSet"])])
    assert refusal(registry, sent) == ["UnresolvedReferenceException"]


@pytest.mark.parametrize("new_folder", [True, False])
@pytest.mark.parametrize("new_document", [True, False])
def test_the_four_ways_into_a_folder(registry: Registry, new_folder: bool, new_document: bool) -> None:
    """TF-3 4.2.2.1.5."""
    case, entry = folder(last_update_time="19990101"), document()
    folders, documents = [case], [entry]
    folder_id, document_id = case.entry_uuid, entry.entry_uuid
    if not new_folder:
        folder_id, folders = registry.register(submission(folders=[case])).entry_uuids[folder_id], []
    if not new_document:
        document_id, documents = registry.register(submission(entry)).entry_uuids[document_id], []
    ids = registry.register(
        submission(*documents, folders=folders, associations=into_folder(folder_id, document_id))
    ).entry_uuids
    found = by_uuid(registry)
    updated = found[ids.get(folder_id, folder_id)]
    assert isinstance(updated, Folder)
    assert updated.last_update_time == NOW.strftime("%Y%m%d%H%M%S")
    memberships = [
        item
        for item in found.values()
        if isinstance(item, Association) and item.source == ids.get(folder_id, folder_id)
    ]
    assert [item.target for item in memberships] == [ids.get(document_id, document_id)]


def test_what_may_not_enter_a_folder(registry: Registry) -> None:
    ids = registry.register(submission(folders=[folder(entry_uuid="F")])).entry_uuids
    case = ids["F"]
    stranger = register_one(registry, patient_id=OTHER_PATIENT)
    sent = submission(document(), associations=into_folder(case, stranger))
    assert refusal(registry, sent) == ["XDSPatientIdDoesNotMatch"]

    outdated = register_one(registry)
    registry.register(relate(uids.RPLC, outdated)[0])
    sent = submission(document(), associations=into_folder(case, outdated))
    assert refusal(registry, sent) == ["XDSRegistryDeprecatedDocumentError"]

    sent = submission(document(), associations=into_folder(case, ids["SubmissionSet"]))
    assert refusal(registry, sent) == ["UnresolvedReferenceException"]
    sent = submission(document(), associations=into_folder(case, "urn:uuid:00000000-1111-4222-8333-444444444444"))
    assert refusal(registry, sent) == ["UnresolvedReferenceException"]


def test_a_replacement_takes_the_place_in_folders(registry: Registry) -> None:
    cases, entry = [folder(), folder()], document()
    first = registry.register(
        submission(
            entry,
            folders=cases,
            associations=[a for case in cases for a in into_folder(case.entry_uuid, entry.entry_uuid)],
        )
    ).entry_uuids
    sent, name = relate(uids.RPLC, first[entry.entry_uuid])
    second = registry.register(sent).entry_uuids

    associations = [item for item in everything(registry) if isinstance(item, Association)]
    for case in cases:
        [membership] = [
            item for item in associations if (item.source, item.target) == (first[case.entry_uuid], second[name])
        ]
        assert membership.home_community_id == HOME
        [origin] = [item for item in associations if item.target == membership.entry_uuid]
        assert origin.source == second["SubmissionSet"]


def test_a_replacement_that_names_its_folder_is_put_there_once(registry: Registry) -> None:
    case, entry = folder(), document()
    ids = registry.register(
        submission(entry, folders=[case], associations=into_folder(case.entry_uuid, entry.entry_uuid))
    ).entry_uuids
    sent, name = relate(uids.RPLC, ids[entry.entry_uuid])
    sent = replace(sent, associations=(*sent.associations, *into_folder(ids[case.entry_uuid], name)))
    new = registry.register(sent).entry_uuids[name]
    memberships = [
        item for item in everything(registry) if isinstance(item, Association) and item.source == ids[case.entry_uuid]
    ]
    assert sorted(item.target for item in memberships) == sorted([ids[entry.entry_uuid], new])


def test_a_replacement_does_not_follow_into_a_folder_of_another_patient(registry: Registry) -> None:
    """Only a change of patient ids behind the folder can make this happen; the check is the Framework's."""
    case, entry = folder(), document()
    ids = registry.register(
        submission(entry, folders=[case], associations=into_folder(case.entry_uuid, entry.entry_uuid))
    ).entry_uuids
    with registry.database.writing() as connection:
        connection.execute(
            update(ObjectRow).where(ObjectRow.entry_uuid == ids[case.entry_uuid]).values(patient_id=OTHER_PATIENT)
        )
    assert refusal(registry, relate(uids.RPLC, ids[entry.entry_uuid])[0]) == ["XDSPatientIdDoesNotMatch"]
