"""ITI-57: new versions, other statuses, new associations, and every rule that forbids one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.registry.conftest import NOW
from tests.registry.samples import (
    HOME,
    OTHER_PATIENT,
    PATIENT,
    association,
    code,
    decoded,
    document,
    folder,
    into_folder,
    submission,
)
from tests.registry.test_concurrency import THREADS, at_once
from tests.registry.test_patients import read_events
from xca_imaging import errors, uids
from xca_imaging.metadata.model import Association, DocumentEntry, Folder, RegistryObject, Submission
from xca_imaging.metadata.stored_query import GetAll, StoredQuery
from xca_imaging.metadata.vocabulary import Vocabulary
from xca_imaging.registry import Registry
from xca_imaging.registry.administration import Administration
from xca_imaging.registry.database import Database
from xca_imaging.registry.events import Requester

ADMINISTRATOR = Requester("administrator", "urn:uuid:2")
UNKNOWN = "urn:uuid:08a15a6f-5b4a-42de-8f95-89474f83abdf"
BOTH = (uids.APPROVED, uids.DEPRECATED)


@pytest.fixture
def administration(registry: Registry) -> Administration:
    return Administration(registry)


def stored(registry: Registry, patient_id: str = PATIENT) -> list[Any]:
    query = GetAll(
        patient_id=patient_id,
        document_status=BOTH,
        submission_set_status=BOTH,
        folder_status=BOTH,
        association_status=BOTH,
        types=(uids.STABLE_DOCUMENT, uids.ON_DEMAND_DOCUMENT),
    )
    return decoded(registry.query(StoredQuery(query)).fragments)


def registered(
    registry: Registry, *items: DocumentEntry | Folder, associations: list[Association] | None = None
) -> Any:
    """Register objects and return what the registry holds of them."""
    documents = [each for each in items if isinstance(each, DocumentEntry)]
    folders = [each for each in items if isinstance(each, Folder)]
    patient_id = items[0].patient_id
    names = registry.register(
        submission(*documents, folders=folders, associations=associations or [], patient_id=patient_id)
    ).entry_uuids
    found = {each.entry_uuid: each for each in stored(registry, patient_id)}
    return [found[names[each.entry_uuid]] for each in items]


def update_of(
    *items: DocumentEntry | Folder, previous: str = "1", patient_id: str = PATIENT, **slots: str
) -> Submission:
    """Return the update of registered objects: they come with a symbolic id and the id of their first version."""
    new = [replace(each, entry_uuid=f"New{number}", version="") for number, each in enumerate(items)]
    made = submission(
        *(each for each in new if isinstance(each, DocumentEntry)),
        folders=[each for each in new if isinstance(each, Folder)],
        patient_id=patient_id,
    )
    return replace(
        made, associations=tuple(replace(each, previous_version=previous, **slots) for each in made.associations)
    )


def status_of(target: str, original: str, new: str, /, **changes: Any) -> Submission:
    change = association(
        uids.UPDATE_AVAILABILITY_STATUS, "SubmissionSet", target, original_status=original, new_status=new
    )
    return submission(associations=[replace(change, **changes)])


def submit_of(new: Association) -> Submission:
    return submission(associations=[new, association(uids.SUBMIT_ASSOCIATION, "SubmissionSet", new.entry_uuid)])


def refused(registry: Registry, administration: Administration, request: Submission) -> list[str]:
    before = stored(registry)
    with pytest.raises(errors.SubmissionRefused) as raised:
        administration.update(request, ADMINISTRATOR)
    assert stored(registry) == before, "a refused update leaves no trace"
    return [each.code for each in raised.value.errors]


def versions_of(registry: Registry, logical_id: str) -> list[Any]:
    return [
        each for each in stored(registry) if each.logical_id == logical_id and isinstance(each, DocumentEntry | Folder)
    ]


# --- Versions ---------------------------------------------------------------------------------------------------------


def test_a_new_version_of_a_document_entry(registry: Registry, administration: Administration) -> None:
    (first,) = registered(registry, document(title="CT"))
    names = administration.update(update_of(replace(first, title="CT of the chest")), ADMINISTRATOR).entry_uuids
    old, new = versions_of(registry, first.entry_uuid)
    assert (old.availability_status, old.title, old.version) == (uids.DEPRECATED, "CT", first.version)
    assert (new.availability_status, new.title, new.version) == (uids.APPROVED, "CT of the chest", "2")
    assert new.entry_uuid == names["New0"] != first.entry_uuid
    assert (new.unique_id, new.home_community_id) == (first.unique_id, first.home_community_id)
    administration.update(update_of(replace(new, title="third"), previous="2"), ADMINISTRATOR)
    assert [each.version for each in versions_of(registry, first.entry_uuid)] == [first.version, "2", "3"]
    assert [each.availability_status for each in versions_of(registry, first.entry_uuid)] == [
        uids.DEPRECATED,
        uids.DEPRECATED,
        uids.APPROVED,
    ]


def test_a_new_version_of_an_on_demand_entry(registry: Registry, administration: Administration) -> None:
    entry = document(object_type=uids.ON_DEMAND_DOCUMENT, creation_time="", hash="", size=None)
    names = administration.register_on_demand(submission(entry), ADMINISTRATOR).entry_uuids
    (first,) = versions_of(registry, names[entry.entry_uuid])
    administration.update(update_of(replace(first, title="changed")), ADMINISTRATOR)
    assert versions_of(registry, first.entry_uuid)[1].title == "changed"


def test_a_new_version_of_a_folder(registry: Registry, administration: Administration) -> None:
    entry, first = document(), folder(title="Oncology")
    entry, first = registered(registry, entry, first, associations=into_folder(first.entry_uuid, entry.entry_uuid))
    administration.update(update_of(replace(first, codes=(code("cardiology"),))), ADMINISTRATOR)
    old, new = versions_of(registry, first.entry_uuid)
    assert (old.availability_status, new.availability_status) == (uids.DEPRECATED, uids.APPROVED)
    assert new.last_update_time == NOW.strftime("%Y%m%d%H%M%S")
    members = {(each.source, each.target) for each in stored(registry) if getattr(each, "type", "") == uids.HAS_MEMBER}
    assert (new.entry_uuid, entry.entry_uuid) in members


@pytest.mark.parametrize("propagation", ["", "yes", "no", "No"])
def test_associations_go_with_the_new_version(
    registry: Registry, administration: Administration, propagation: str
) -> None:
    entry, kept = document(), folder()
    entry, kept = registered(registry, entry, kept, associations=into_folder(kept.entry_uuid, entry.entry_uuid))
    (addendum,) = registered(
        registry, document(entry_uuid="Addendum"), associations=[association(uids.APND, "Addendum", entry.entry_uuid)]
    )
    names = administration.update(
        update_of(replace(entry, title="changed"), association_propagation=propagation), ADMINISTRATOR
    ).entry_uuids
    new = names["New0"]
    found = {(each.source, each.type, each.target): each for each in stored(registry) if isinstance(each, Association)}
    copied = propagation in ("", "yes")
    assert ((addendum.entry_uuid, uids.APND, new) in found) is copied
    assert ((kept.entry_uuid, uids.HAS_MEMBER, new) in found) is copied
    if copied:  # the submission that made the membership says so
        membership = found[kept.entry_uuid, uids.HAS_MEMBER, new].entry_uuid
        assert (names["SubmissionSet"], uids.HAS_MEMBER, membership) in found
    # Memberships in other submissions stay with the version that they submitted.
    assert (
        sum(target == new and source != kept.entry_uuid for source, kind, target in found if kind == uids.HAS_MEMBER)
        == 1
    )


def test_a_new_version_stays_out_of_a_deprecated_folder(registry: Registry, administration: Administration) -> None:
    entry, kept = document(), folder()
    entry, kept = registered(registry, entry, kept, associations=into_folder(kept.entry_uuid, entry.entry_uuid))
    administration.update(status_of(kept.entry_uuid, uids.APPROVED, uids.DEPRECATED), ADMINISTRATOR)
    new = administration.update(update_of(entry), ADMINISTRATOR).entry_uuids["New0"]
    assert (kept.entry_uuid, new) not in {
        (getattr(each, "source", ""), getattr(each, "target", "")) for each in stored(registry)
    }


def test_a_delayed_document_gets_its_hash_and_size(registry: Registry, administration: Administration) -> None:
    (first,) = registered(registry, document())  # the samples are of size 0, with the hash of nothing
    assembled = replace(first, hash="2fd4e1c67a2d28fced849ee1bb76e7391b93eb12", size=43)
    administration.update(update_of(assembled), ADMINISTRATOR)
    assert versions_of(registry, first.entry_uuid)[1].size == 43
    again = replace(assembled, size=44)
    assert refused(registry, administration, update_of(again, previous="2")) == ["XDSMetadataUpdateError"]


REFUSED_VERSIONS = [
    (lambda first: update_of(first, previous=""), ["XDSMetadataUpdateError"]),
    (lambda first: update_of(first, previous="2"), ["XDSMetadataVersionError"]),
    (lambda first: update_of(first, previous="one"), ["XDSMetadataVersionError"]),
    (lambda first: update_of(first, association_propagation="maybe"), ["XDSMetadataUpdateError"]),
    (lambda first: update_of(replace(first, logical_id="")), ["XDSMetadataUpdateError"]),
    (lambda first: update_of(replace(first, logical_id="Symbolic")), ["XDSMetadataUpdateError"]),
    (lambda first: update_of(replace(first, logical_id=UNKNOWN)), ["XDSMetadataUpdateError"]),
    (lambda first: update_of(replace(first, unique_id="2.25.1")), ["XDSMetadataUpdateError"]),
    (
        lambda first: update_of(
            replace(first, object_type=uids.ON_DEMAND_DOCUMENT, creation_time="", hash="", size=None)
        ),
        ["XDSMetadataUpdateError"],
    ),
    (
        lambda first: update_of(replace(first, patient_id=OTHER_PATIENT), patient_id=OTHER_PATIENT),
        ["XDSPatientIDReconciliationError"],
    ),
    (lambda first: update_of(replace(first, patient_id=OTHER_PATIENT)), ["XDSPatientIdDoesNotMatch"]),
    (lambda first: update_of(replace(first, language_code="")), ["XDSRegistryMetadataError"]),
    (lambda first: replace(update_of(first), submission_sets=()), ["XDSRegistryMetadataError"]),
    (lambda first: replace(update_of(first), associations=()), ["XDSMetadataUpdateError"]),
    (lambda first: submission(), ["XDSMetadataUpdateOperationError"]),
]


@pytest.mark.parametrize(("make", "codes"), REFUSED_VERSIONS)
def test_updates_that_are_refused(
    registry: Registry, administration: Administration, make: Any, codes: list[str]
) -> None:
    (first,) = registered(registry, document(hash="2fd4e1c67a2d28fced849ee1bb76e7391b93eb12", size=43))
    assert refused(registry, administration, make(first)) == codes


def test_codes_that_the_affinity_domain_does_not_allow(url: str) -> None:
    vocabulary = Vocabulary({"typeCode": frozenset({("ct-chest", "1.3.6.1.4.1.21367.2017.3")})})
    registry = Registry.open(url, home_community_id=HOME, vocabulary=vocabulary)
    (first,) = registered(registry, document())
    request = update_of(replace(first, type_code=code("another")))
    assert refused(registry, Administration(registry), request) == ["XDSRegistryMetadataError"]
    registry.close()


def test_an_update_under_an_id_that_is_taken(registry: Registry, administration: Administration) -> None:
    first, other = registered(registry, document(), document())
    request = update_of(first)
    (new,) = request.documents
    taken = replace(
        request,
        documents=(replace(new, entry_uuid=other.entry_uuid),),
        associations=tuple(replace(each, target=other.entry_uuid) for each in request.associations),
    )
    assert refused(registry, administration, taken) == ["XDSRegistryMetadataError"]
    itself = replace(
        request,
        documents=(replace(new, entry_uuid=first.entry_uuid),),
        associations=tuple(replace(each, target=first.entry_uuid) for each in request.associations),
    )
    assert refused(registry, administration, itself) == ["XDSMetadataUpdateError"]


def test_an_update_of_what_is_deprecated(registry: Registry, administration: Administration) -> None:
    (first,) = registered(registry, document())
    administration.update(status_of(first.entry_uuid, uids.APPROVED, uids.DEPRECATED), ADMINISTRATOR)
    assert refused(registry, administration, update_of(first)) == ["XDSMetadataUpdateError"]


def test_two_updates_of_one_object_in_one_submission(registry: Registry, administration: Administration) -> None:
    (first,) = registered(registry, document())
    codes = refused(registry, administration, update_of(first, replace(first, title="other")))
    assert set(codes) >= {"XDSRegistryDuplicateUniqueIdInMessage"}


def test_two_updates_from_the_same_version(registry: Registry, administration: Administration) -> None:
    (first,) = registered(registry, document())
    administration.update(update_of(replace(first, title="mine")), ADMINISTRATOR)
    assert refused(registry, administration, update_of(replace(first, title="yours"))) == ["XDSMetadataVersionError"]


def test_a_document_is_no_folder(registry: Registry, administration: Administration) -> None:
    entry, kept = registered(registry, document(), folder())
    assert refused(registry, administration, update_of(replace(kept, logical_id=entry.entry_uuid))) == [
        "XDSMetadataUpdateError"
    ]


def test_a_submission_set_that_is_registered_already(registry: Registry, administration: Administration) -> None:
    (first,) = registered(registry, document())
    request = update_of(first)
    used = next(each for each in stored(registry) if hasattr(each, "source_id"))
    again = replace(request, submission_sets=(replace(request.submission_sets[0], unique_id=used.unique_id),))
    assert refused(registry, administration, again) == ["XDSDuplicateUniqueIdInRegistry"]


# --- Statuses ---------------------------------------------------------------------------------------------------------


def status(registry: Registry, entry_uuid: str) -> str:
    return next(str(each.availability_status) for each in stored(registry) if each.entry_uuid == entry_uuid)


def test_statuses_change_there_and_back(registry: Registry, administration: Administration) -> None:
    entry, kept = document(), folder()
    memberships = into_folder(kept.entry_uuid, entry.entry_uuid)
    names = registry.register(submission(entry, folders=[kept], associations=memberships)).entry_uuids
    for each in (entry, kept, memberships[0]):
        target = names[each.entry_uuid]
        administration.update(status_of(target, uids.APPROVED, uids.DEPRECATED), ADMINISTRATOR)
        assert status(registry, target) == uids.DEPRECATED
        administration.update(status_of(target, uids.DEPRECATED, uids.APPROVED), ADMINISTRATOR)
        assert status(registry, target) == uids.APPROVED


def test_a_status_of_what_is_updated_too_goes_to_the_new_version(
    registry: Registry, administration: Administration
) -> None:
    (first,) = registered(registry, document())
    for target in (first.entry_uuid, "New0"):
        newest = versions_of(registry, first.entry_uuid)[-1]
        request = update_of(newest, previous=newest.version or "1")
        change = status_of(newest.entry_uuid if target != "New0" else target, uids.APPROVED, uids.DEPRECATED)
        administration.update(
            replace(request, associations=(*request.associations, *change.associations)), ADMINISTRATOR
        )
        *_, old, new = versions_of(registry, first.entry_uuid)
        assert (old.availability_status, new.availability_status) == (uids.DEPRECATED, uids.DEPRECATED)
        administration.update(status_of(new.entry_uuid, uids.DEPRECATED, uids.APPROVED), ADMINISTRATOR)


def test_the_status_of_an_old_version_stays(registry: Registry, administration: Administration) -> None:
    (first,) = registered(registry, document())
    administration.update(update_of(first), ADMINISTRATOR)
    request = status_of(first.entry_uuid, uids.DEPRECATED, uids.APPROVED)
    assert refused(registry, administration, request) == ["XDSMetadataUpdateError"]


@pytest.mark.parametrize(
    ("changes", "codes"),
    [
        ({"original_status": uids.DEPRECATED}, ["XDSMetadataUpdateError"]),
        ({"original_status": ""}, ["XDSMetadataUpdateError"]),
        ({"new_status": ""}, ["XDSMetadataUpdateError"]),
        ({"new_status": "urn:oasis:names:tc:ebxml-regrep:StatusType:Submitted"}, ["XDSMetadataUpdateError"]),
        ({"target": UNKNOWN}, ["UnresolvedReferenceException"]),
        ({"source": UNKNOWN}, ["XDSMetadataUpdateError"]),
        ({"type": "urn:example:Unknown"}, ["XDSMetadataUpdateOperationError"]),
        ({"type": uids.HAS_MEMBER}, ["XDSMetadataUpdateOperationError"]),
    ],
)
def test_changes_of_status_that_are_refused(
    registry: Registry, administration: Administration, changes: dict[str, str], codes: list[str]
) -> None:
    (first,) = registered(registry, document())
    request = status_of(first.entry_uuid, uids.APPROVED, uids.DEPRECATED, **changes)
    assert refused(registry, administration, request) == codes


def test_the_status_of_another_patients_document(registry: Registry, administration: Administration) -> None:
    (other,) = registered(registry, document(patient_id=OTHER_PATIENT))
    request = status_of(other.entry_uuid, uids.APPROVED, uids.DEPRECATED)
    assert refused(registry, administration, request) == ["XDSPatientIDReconciliationError"]


def test_a_submission_set_has_no_other_status(registry: Registry, administration: Administration) -> None:
    names = registry.register(submission(document())).entry_uuids
    request = status_of(names["SubmissionSet"], uids.APPROVED, uids.DEPRECATED)
    assert refused(registry, administration, request) == ["XDSMetadataUpdateError"]


def test_a_status_changed_twice(registry: Registry, administration: Administration) -> None:
    (first,) = registered(registry, document())
    once = status_of(first.entry_uuid, uids.APPROVED, uids.DEPRECATED)
    twice = status_of(first.entry_uuid, uids.APPROVED, uids.DEPRECATED)
    request = replace(once, associations=(*once.associations, *twice.associations))
    assert refused(registry, administration, request) == ["XDSMetadataUpdateError"]


# --- Associations -----------------------------------------------------------------------------------------------------


def test_a_document_put_into_a_folder(registry: Registry, administration: Administration) -> None:
    entry, kept = registered(registry, document(), folder())
    names = administration.update(
        submit_of(association(uids.HAS_MEMBER, kept.entry_uuid, entry.entry_uuid, entry_uuid="Membership")),
        ADMINISTRATOR,
    ).entry_uuids
    made = next(each for each in stored(registry) if each.entry_uuid == names["Membership"])
    assert (made.source, made.target, made.availability_status) == (kept.entry_uuid, entry.entry_uuid, uids.APPROVED)


def test_a_replacement_told_afterwards(registry: Registry, administration: Administration) -> None:
    old, new = registered(registry, document(), document())
    administration.update(submit_of(association(uids.RPLC, new.entry_uuid, old.entry_uuid)), ADMINISTRATOR)
    assert (status(registry, old.entry_uuid), status(registry, new.entry_uuid)) == (uids.DEPRECATED, uids.APPROVED)


@pytest.mark.parametrize(
    ("type_", "ends", "codes"),
    [
        (uids.HAS_MEMBER, ("entry", "kept"), ["XDSMetadataUpdateError"]),
        (uids.RPLC, ("kept", "entry"), ["XDSMetadataUpdateError"]),
        ("urn:example:Unknown", ("kept", "entry"), ["XDSMetadataUpdateError"]),
        (uids.HAS_MEMBER, ("kept", "nothing"), ["UnresolvedReferenceException"]),
        (uids.HAS_MEMBER, ("kept", "deprecated"), ["XDSRegistryDeprecatedDocumentError"]),
        (uids.APND, ("entry", "foreign"), ["XDSPatientIdDoesNotMatch"]),
    ],
)
def test_associations_that_are_refused(
    registry: Registry, administration: Administration, type_: str, ends: tuple[str, str], codes: list[str]
) -> None:
    entry, kept, deprecated = registered(registry, document(), folder(), document())
    (foreign,) = registered(registry, document(patient_id=OTHER_PATIENT))
    administration.update(status_of(deprecated.entry_uuid, uids.APPROVED, uids.DEPRECATED), ADMINISTRATOR)
    names: dict[str, RegistryObject] = {"entry": entry, "kept": kept, "deprecated": deprecated, "foreign": foreign}
    source, target = (names[end].entry_uuid if end in names else UNKNOWN for end in ends)
    assert refused(registry, administration, submit_of(association(type_, source, target))) == codes


def test_an_answer_names_a_bounded_number_of_problems(registry: Registry, administration: Administration) -> None:
    changes = [status_of(UNKNOWN[:-4] + f"{number:04x}", uids.APPROVED, uids.DEPRECATED) for number in range(300)]
    request = replace(changes[0], associations=tuple(each for change in changes for each in change.associations))
    assert refused(registry, administration, request) == ["UnresolvedReferenceException"] * 100
    alone = [association(uids.RPLC, UNKNOWN, UNKNOWN) for _ in range(300)]
    assert len(refused(registry, administration, submission(associations=alone))) == 100


def test_an_association_that_nothing_submits(registry: Registry, administration: Administration) -> None:
    entry, kept = registered(registry, document(), folder())
    alone = submission(associations=[association(uids.HAS_MEMBER, kept.entry_uuid, entry.entry_uuid)])
    assert refused(registry, administration, alone) == ["XDSMetadataUpdateOperationError"]


# --- Several at once --------------------------------------------------------------------------------------------------


def test_of_several_updates_from_one_version_one_wins(registry: Registry, administration: Administration) -> None:
    (first,) = registered(registry, document())

    def attempt(number: int) -> str:
        try:
            administration.update(update_of(replace(first, title=f"by {number}")), ADMINISTRATOR)
        except errors.SubmissionRefused as problem:
            return ",".join(each.code for each in problem.errors)
        return "updated"

    assert at_once(attempt) == ["XDSMetadataVersionError"] * (THREADS - 1) + ["updated"]
    assert [each.availability_status for each in versions_of(registry, first.entry_uuid)] == [
        uids.DEPRECATED,
        uids.APPROVED,
    ]


# --- On-demand entries and events -------------------------------------------------------------------------------------


def on_demand(**changes: Any) -> DocumentEntry:
    return document(
        **{"object_type": uids.ON_DEMAND_DOCUMENT, "creation_time": "", "hash": "", "size": None, **changes}
    )


def test_on_demand_entries_are_registered(registry: Registry, administration: Administration) -> None:
    entry = on_demand()
    administration.register_on_demand(submission(entry), ADMINISTRATOR)
    # Another with the same uniqueId is accepted.
    administration.register_on_demand(submission(on_demand(unique_id=entry.unique_id)), ADMINISTRATOR)
    found = administration.on_demand_entry(entry.repository_unique_id, entry.unique_id)
    assert found is not None
    assert found.unique_id == entry.unique_id
    assert administration.on_demand_entry("1.2.3", entry.unique_id) is None
    assert administration.on_demand_entry(entry.repository_unique_id, "1.2.3") is None


@pytest.mark.parametrize(
    "changes",
    [
        {"creation_time": "2024"},
        {"hash": "da39a3ee5e6b4b0d3255bfef95601890afd80709"},
        {"size": 0},
        {"repository_unique_id": ""},
        {"object_type": uids.STABLE_DOCUMENT},
    ],
)
def test_on_demand_entries_that_are_refused(
    registry: Registry, administration: Administration, changes: dict[str, Any]
) -> None:
    with pytest.raises(errors.SubmissionRefused) as raised:
        administration.register_on_demand(submission(on_demand(**changes)), ADMINISTRATOR)
    assert {each.code for each in raised.value.errors} == {"XDSRegistryMetadataError"}
    assert stored(registry) == []


def test_an_on_demand_entry_with_the_unique_id_of_a_stable_one(
    registry: Registry, administration: Administration
) -> None:
    stable = document()
    registry.register(submission(stable))
    with pytest.raises(errors.SubmissionRefused) as raised:
        administration.register_on_demand(submission(on_demand(unique_id=stable.unique_id)), ADMINISTRATOR)
    assert [each.code for each in raised.value.errors] == ["XDSDuplicateUniqueIdInRegistry"]
    entry = on_demand()
    administration.register_on_demand(submission(entry), ADMINISTRATOR)
    with pytest.raises(errors.SubmissionRefused) as raised:
        registry.register(submission(document(unique_id=entry.unique_id)))
    assert [each.code for each in raised.value.errors] == ["XDSDuplicateUniqueIdInRegistry"]


def test_a_busy_database_is_told_at_once(registry: Registry, administration: Administration, url: str) -> None:
    (first,) = registered(registry, document())
    impatient = Database(url, busy_timeout=0.05)
    waiting = Administration(Registry(impatient, registry.policy, now=registry.now))
    with registry.database.writing(), pytest.raises(errors.RegistryBusy):
        waiting.update(status_of(first.entry_uuid, uids.APPROVED, uids.DEPRECATED), ADMINISTRATOR)
    impatient.close()
    assert read_events(registry) == []


def test_updates_leave_events(registry: Registry, administration: Administration) -> None:
    (first,) = registered(registry, document())
    request = update_of(first)
    administration.update(request, ADMINISTRATOR)
    with pytest.raises(errors.SubmissionRefused):
        administration.update(update_of(first), ADMINISTRATOR)
    done, failed = read_events(registry)
    assert (done.transaction, done.action, done.outcome) == ("ITI-57", "update", "success")
    assert (done.caller, done.message_id, done.patient_id) == ("administrator", "urn:uuid:2", PATIENT)
    assert done.objects == (first.entry_uuid,)
    assert done.facts == {"submission_set": request.submission_sets[0].unique_id}
    assert (failed.outcome, failed.objects) == ("refused", (first.entry_uuid,))
    assert failed.facts == {"reason": "XDSMetadataVersionError"}
