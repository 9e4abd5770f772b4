"""What stored queries find: each parameter with its semantics, and the indexes that answers come from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.registry.conftest import NewUrl
from tests.registry.samples import (
    HOME,
    KOS,
    OTHER_PATIENT,
    PATIENT,
    association,
    code,
    decoded,
    document,
    folder,
    into_folder,
    study_reference,
    submission,
)
from xca_imaging import errors, uids
from xca_imaging.metadata.model import Association, Author, DocumentEntry, Folder, ObjectRef, SubmissionSet
from xca_imaging.metadata.stored_query import FindDocuments, GetAll, GetDocuments, ReturnType, StoredQuery
from xca_imaging.registry import Registry, conditions, search
from xca_imaging.registry.tables import time_key

ACCESSION = f"ACC-1^^^&1.3.6.1.4.1.21367.13.202.2000&ISO^{uids.REFERENCE_ACCESSION}"
STUDY = study_reference("1.2.826.0.1.3680043.8.498.1")

# title -> what is special about the document; every one is the same patient's
SPECIAL: dict[str, dict[str, Any]] = {
    "plain": {},
    "class b": {"class_code": code("b")},
    "class b elsewhere": {"class_code": code("b", "1.2.3")},
    "type b": {"type_code": code("b")},
    "setting b": {"practice_setting_code": code("b")},
    "facility b": {"healthcare_facility_type_code": code("b")},
    "format b": {"format_code": code("b")},
    "events x": {"event_codes": (code("x"), code("x"))},
    "events xy": {"event_codes": (code("x"), code("y"))},
    "events yz": {"event_codes": (code("y"), code("z"))},
    "restricted": {"confidentiality_codes": (code("R"), code("V"))},
    "by O'Neil": {"authors": (Author(person="^O'Neil^Una^^^"), Author(institutions=("Example Hospital",)))},
    "by O\\T\\N 100%": {"authors": (Author(person="^O\\T\\N^100%^^^"),)},
    "offline": {"document_availability": uids.DOCUMENT_OFFLINE},
    "accession": {"reference_ids": (ACCESSION,)},
    "accession and study": {"reference_ids": (ACCESSION, STUDY, STUDY)},
    "created 2023": {"creation_time": "2023"},
    "created 202401": {"creation_time": "202401"},
    "served March": {"service_start_time": "20240301", "service_stop_time": "20240331235959"},
}
ON_DEMAND = {"object_type": uids.ON_DEMAND_DOCUMENT, "creation_time": "", "hash": "", "size": None}


def load(registry: Registry) -> None:
    """Register the documents of `SPECIAL`, an on-demand one, and one of another patient."""
    registry.register(submission(*(document(title=title, **changes) for title, changes in SPECIAL.items())))
    registry.register(submission(document(title="on demand", **ON_DEMAND)), on_demand=True)
    other = document(title="other patient", patient_id=OTHER_PATIENT, reference_ids=(ACCESSION,))
    registry.register(submission(other, patient_id=OTHER_PATIENT))


@pytest.fixture(scope="module")
def loaded(new_url: NewUrl) -> Iterator[Registry]:
    registry = Registry.open(new_url(), home_community_id=HOME)
    load(registry)
    yield registry
    registry.close()


def find(registry: Registry, **parameters: Any) -> set[str]:
    """Return the titles of what FindDocuments finds; the references are the same objects in the same order."""
    parameters = {"patient_id": PATIENT, "status": (uids.APPROVED,), **parameters}
    leaves = registry.query(StoredQuery(FindDocuments(**parameters)))
    refs = registry.query(StoredQuery(FindDocuments(**parameters), "ObjectRef"))
    assert leaves.refs == ()
    assert refs.fragments == ()
    entries = decoded(leaves.fragments)
    assert refs.refs == tuple(ObjectRef(entry.entry_uuid, HOME) for entry in entries)
    return {entry.title for entry in entries if isinstance(entry, DocumentEntry)}


def test_by_patient_alone_every_stable_document_is_found(loaded: Registry) -> None:
    assert find(loaded) == set(SPECIAL)
    assert find(loaded, patient_id=OTHER_PATIENT) == {"other patient"}
    assert find(loaded, patient_id="test-3^^^&1.2.3&ISO") == set()


def test_types(loaded: Registry) -> None:
    assert find(loaded, types=(uids.ON_DEMAND_DOCUMENT,)) == {"on demand"}
    assert find(loaded, types=(uids.ON_DEMAND_DOCUMENT, uids.STABLE_DOCUMENT)) == {*SPECIAL, "on demand"}
    assert find(loaded, types=("urn:uuid:10aa1a4b-715a-4120-bfd0-9760414112c8", uids.STABLE_DOCUMENT)) == set(SPECIAL)


@pytest.mark.parametrize(
    ("parameter", "found"),
    [
        ("class_codes", "class b"),
        ("type_codes", "type b"),
        ("practice_setting_codes", "setting b"),
        ("healthcare_facility_type_codes", "facility b"),
        ("format_codes", "format b"),
    ],
)
def test_single_codes_match_by_code_and_scheme(loaded: Registry, parameter: str, found: str) -> None:
    assert find(loaded, **{parameter: (code("b"),)}) == {found}
    assert find(loaded, **{parameter: (code("b"), code("nothing"))}) == {found}
    assert find(loaded, **{parameter: (code("nothing"),)}) == set()


def test_a_code_of_another_scheme_is_another_code(loaded: Registry) -> None:
    assert find(loaded, class_codes=(code("b", "1.2.3"),)) == {"class b elsewhere"}
    assert find(loaded, class_codes=(code("b"), code("b", "1.2.3"))) == {"class b", "class b elsewhere"}


def test_values_of_one_slot_are_or_repeated_slots_are_and(loaded: Registry) -> None:
    x, y, z = code("x"), code("y"), code("z")
    assert find(loaded, event_codes=((x,),)) == {"events x", "events xy"}
    assert find(loaded, event_codes=((x, z),)) == {"events x", "events xy", "events yz"}
    assert find(loaded, event_codes=((x,), (y,))) == {"events xy"}
    assert find(loaded, event_codes=((x, z), (y,))) == {"events xy", "events yz"}
    assert find(loaded, event_codes=((x,), (z,))) == set()
    assert find(loaded, confidentiality_codes=((code("R"),), (code("V"),))) == {"restricted"}
    assert find(loaded, confidentiality_codes=((code("R"), code("V")),)) == {"restricted"}


def test_reference_ids_match_exactly_and_within_the_patient(loaded: Registry) -> None:
    assert find(loaded, reference_ids=((ACCESSION,),)) == {"accession", "accession and study"}
    assert find(loaded, reference_ids=((ACCESSION, STUDY),)) == {"accession", "accession and study"}
    assert find(loaded, reference_ids=((ACCESSION,), (STUDY,))) == {"accession and study"}
    assert find(loaded, reference_ids=(("ACC-%",),)) == set()


def test_author_person_is_a_like_pattern(loaded: Registry) -> None:
    assert find(loaded, author_persons=("%O'Neil%",)) == {"by O'Neil"}
    assert find(loaded, author_persons=("^O_Neil^Una^^^",)) == {"by O'Neil"}
    assert find(loaded, author_persons=("%o'neil%",)) == set()  # octet by octet: TF-2 Appendix F
    assert find(loaded, author_persons=("O'Neil",)) == set()
    assert find(loaded, author_persons=("%\\T\\%",)) == {"by O\\T\\N 100%"}  # the backslash is no escape
    assert find(loaded, author_persons=("%Ada%", "%Una%")) == set(SPECIAL) - {"by O\\T\\N 100%"}


def test_creation_time_is_from_inclusive_to_exclusive(loaded: Registry) -> None:
    rest = set(SPECIAL) - {"created 2023", "created 202401"}
    assert find(loaded, creation_time_from="20240229101500") == rest
    assert find(loaded, creation_time_from="20240229101501") == set()
    assert find(loaded, creation_time_to="20240229101500") == {"created 2023", "created 202401"}
    assert find(loaded, creation_time_from="20240229", creation_time_to="20240301") == rest


def test_times_of_less_precision_are_their_first_instant(loaded: Registry) -> None:
    assert find(loaded, creation_time_from="20230101", creation_time_to="20230102") == {"created 2023"}
    assert find(loaded, creation_time_from="2023", creation_time_to="2024") == {"created 2023"}
    assert find(loaded, creation_time_from="2024", creation_time_to="202402") == {"created 202401"}
    assert [time_key(dtm) for dtm in ("2024", "202402", "20240229", "2024022910", "202402291015")] == [
        "20240101000000",
        "20240201000000",
        "20240229000000",
        "20240229100000",
        "20240229101500",
    ]


def test_creation_time_does_not_apply_to_on_demand_entries(loaded: Registry) -> None:
    assert find(loaded, types=(uids.ON_DEMAND_DOCUMENT,), creation_time_from="2030") == {"on demand"}


@pytest.mark.parametrize("time", ["service_start_time", "service_stop_time"])
def test_an_entry_without_service_times_is_not_left_out_by_them(loaded: Registry, time: str) -> None:
    assert find(loaded, **{f"{time}_from": "20240301", f"{time}_to": "20240401"}) == set(SPECIAL)
    assert find(loaded, **{f"{time}_from": "20240401"}) == set(SPECIAL) - {"served March"}
    assert find(loaded, **{f"{time}_to": "20240301"}) == set(SPECIAL) - {"served March"}


def test_parameters_are_combined_by_and(loaded: Registry) -> None:
    assert find(loaded, class_codes=(code("images"),), event_codes=((code("x"),),), creation_time_from="2024") == {
        "events x",
        "events xy",
    }
    assert find(loaded, class_codes=(code("b"),), event_codes=((code("x"),),)) == set()


def test_status(registry: Registry) -> None:
    old = document(title="old")
    target = registry.register(submission(old)).entry_uuids[old.entry_uuid]
    new = document(title="new")
    registry.register(submission(new, associations=[association(uids.RPLC, new.entry_uuid, target)]))
    assert find(registry) == {"new"}
    assert find(registry, status=(uids.DEPRECATED,)) == {"old"}
    assert find(registry, status=(uids.APPROVED, uids.DEPRECATED)) == {"old", "new"}
    assert find(registry, status=("urn:oasis:names:tc:ebxml-regrep:StatusType:Submitted",)) == set()


# --- GetDocuments -----------------------------------------------------------------------------------------------------


def test_documents_by_their_ids(registry: Registry) -> None:
    entries = [document(), document()]
    ids = registry.register(submission(*entries, folders=[folder()])).entry_uuids
    again = registry.register(submission(entries[0])).entry_uuids[entries[0].entry_uuid]
    wanted = tuple(ids[entry.entry_uuid] for entry in entries)

    def get(return_type: ReturnType = "LeafClass", **query: Any) -> list[str]:
        found = registry.query(StoredQuery(GetDocuments(**query), return_type))
        return [item.entry_uuid for item in decoded(found.fragments)] + [ref.id for ref in found.refs]

    assert get(entry_uuids=wanted) == list(wanted)
    assert get(entry_uuids=(*reversed(wanted), *wanted, "urn:uuid:00000000-1111-4222-8333-444444444444")) == list(
        wanted
    )
    assert get("ObjectRef", entry_uuids=wanted[:1]) == list(wanted[:1])
    assert get(unique_ids=(entries[0].unique_id,)) == [wanted[0], again]  # one document, two entries
    assert get(entry_uuids=tuple(ids.values())) == list(wanted)  # only documents
    assert get(unique_ids=("1.2.3",)) == []


def test_more_ids_than_a_statement_takes(registry: Registry) -> None:
    ids = registry.register(submission(document(entry_uuid="D"))).entry_uuids
    many = tuple(f"urn:uuid:00000000-0000-4000-8000-{number:012}" for number in range(40_000))
    found = registry.query(StoredQuery(GetDocuments(entry_uuids=(*many, ids["D"]))))
    assert len(found.fragments) == 1


def test_leaves_by_ids_may_not_mix_patients(registry: Registry) -> None:
    first = registry.register(submission(document(entry_uuid="D"))).entry_uuids["D"]
    other = document(entry_uuid="D", patient_id=OTHER_PATIENT)
    second = registry.register(submission(other, patient_id=OTHER_PATIENT)).entry_uuids["D"]
    query = GetDocuments(entry_uuids=(first, second))
    with pytest.raises(errors.ResultNotSinglePatient):
        registry.query(StoredQuery(query))
    assert {ref.id for ref in registry.query(StoredQuery(query, "ObjectRef")).refs} == {first, second}


# --- GetAll -----------------------------------------------------------------------------------------------------------


def all_of(**parameters: Any) -> GetAll:
    approved = (uids.APPROVED,)
    return GetAll(
        **{
            "patient_id": PATIENT,
            "document_status": approved,
            "submission_set_status": approved,
            "folder_status": approved,
            **parameters,
        }
    )


def test_everything_of_a_patient_with_the_associations_that_touch_it(registry: Registry) -> None:
    case, kept, dropped = folder(), document(), document(format_code=code("text"))
    ids = registry.register(
        submission(kept, dropped, folders=[case], associations=into_folder(case.entry_uuid, kept.entry_uuid))
    ).entry_uuids
    stranger = document(patient_id=OTHER_PATIENT)
    reference = association(
        uids.HAS_MEMBER, "SubmissionSet", ids[kept.entry_uuid], submission_set_status="Reference", entry_uuid="A"
    )
    by_reference = registry.register(
        submission(stranger, associations=[reference], patient_id=OTHER_PATIENT)
    ).entry_uuids["A"]

    found = decoded(registry.query(StoredQuery(all_of())).fragments)
    assert {item.entry_uuid for item in found} == {*ids.values(), by_reference}
    kinds = [type(item) for item in found]
    assert kinds == sorted(kinds, key=[SubmissionSet, DocumentEntry, Folder, Association].index)
    refs = registry.query(StoredQuery(all_of(), "ObjectRef")).refs
    assert [ref.id for ref in refs] == [item.entry_uuid for item in found]

    found = decoded(registry.query(StoredQuery(all_of(format_codes=(KOS,)))).fragments)
    # The association with the document that is left out begins at the submission set: it is returned (3.18, note).
    assert {item.entry_uuid for item in found} == {*ids.values(), by_reference} - {ids[dropped.entry_uuid]}

    nothing = all_of(document_status=(uids.DEPRECATED,), submission_set_status=(uids.DEPRECATED,))
    found = decoded(registry.query(StoredQuery(nothing)).fragments)
    assert {type(item) for item in found} == {Folder, Association}
    assert list(registry.query(StoredQuery(all_of(patient_id="test-3^^^&1.2.3&ISO"))).fragments) == []


def test_everything_filtered_by_confidentiality_and_type(registry: Registry) -> None:
    registry.register(submission(document(title="R", confidentiality_codes=(code("R"),)), document(title="N")))
    registry.register(submission(document(title="on demand", **ON_DEMAND)), on_demand=True)

    def titles(**parameters: Any) -> set[str]:
        found = decoded(registry.query(StoredQuery(all_of(**parameters))).fragments)
        return {item.title for item in found if isinstance(item, DocumentEntry)}

    assert titles() == {"R", "N"}
    assert titles(confidentiality_codes=((code("R"),),)) == {"R"}
    assert titles(types=(uids.ON_DEMAND_DOCUMENT,)) == {"on demand"}


def test_an_answer_longer_than_a_page_is_whole_and_in_order(registry: Registry) -> None:
    entries = [document(entry_uuid=f"Document-{number}") for number in range(2 * search.PAGE + 1)]
    ids = registry.register(submission(*entries)).entry_uuids
    found = registry.query(StoredQuery(FindDocuments(patient_id=PATIENT, status=(uids.APPROVED,))))
    assert len(found.fragments) == len(entries)
    pages = list(found.pages())
    assert [len(page) for page in pages] == [search.PAGE, search.PAGE, 1]
    wanted = [ids[entry.entry_uuid] for entry in entries]
    assert [item.entry_uuid for page in pages for item in decoded(page)] == wanted
    assert [item.entry_uuid for item in decoded(found.fragments)] == wanted  # may be read again
    refs = registry.query(StoredQuery(FindDocuments(patient_id=PATIENT, status=(uids.APPROVED,)), "ObjectRef"))
    assert sum(len(page) for page in refs.pages()) == len(entries)


def test_by_document_availability(loaded: Registry) -> None:
    assert find(loaded, availability=(uids.DOCUMENT_OFFLINE,)) == {"offline"}
    assert find(loaded, availability=(uids.DOCUMENT_ONLINE,)) == set(SPECIAL) - {"offline"}
    assert find(loaded, availability=(uids.DOCUMENT_ONLINE, uids.DOCUMENT_OFFLINE)) == set(SPECIAL)


# --- Limits -----------------------------------------------------------------------------------------------------------


def test_too_many_leaves_are_refused_references_are_not(url: str) -> None:
    registry = Registry.open(url, home_community_id=HOME, max_results=3)
    ids = registry.register(submission(*(document() for _ in range(3)))).entry_uuids
    find_all = FindDocuments(patient_id=PATIENT, status=(uids.APPROVED,))
    assert len(registry.query(StoredQuery(find_all)).fragments) == 3
    with pytest.raises(errors.TooManyResults):  # 1 submission set, 3 documents, 3 associations
        registry.query(StoredQuery(all_of()))
    assert len(registry.query(StoredQuery(all_of(), "ObjectRef")).refs) == 7

    ids |= registry.register(submission(document())).entry_uuids
    uuids = tuple(ids.values())
    for query in (find_all, GetDocuments(entry_uuids=uuids)):
        with pytest.raises(errors.TooManyResults):
            registry.query(StoredQuery(query))
        assert len(registry.query(StoredQuery(query, "ObjectRef")).refs) == 4
    registry.close()

    unlimited = Registry.open(url, home_community_id=HOME, max_results=0)
    assert len(unlimited.query(StoredQuery(find_all)).fragments) == 4
    unlimited.close()


def test_the_associations_of_a_full_answer_count(url: str) -> None:
    registry = Registry.open(url, home_community_id=HOME, max_results=4)
    registry.register(submission(*(document() for _ in range(3))))
    with pytest.raises(errors.TooManyResults):
        registry.query(StoredQuery(all_of()))
    registry.close()


def test_a_query_is_bounded(loaded: Registry) -> None:
    many = tuple(code(str(number)) for number in range(conditions.MAX_VALUES))
    assert find(loaded, class_codes=many) == set()
    assert find(loaded, event_codes=((code("x"),),) * conditions.MAX_CONDITIONS) == {"events x", "events xy"}
    patterns = ("%none%",) * conditions.MAX_PATTERNS
    assert find(loaded, author_persons=patterns) == set()
    for parameters in (
        {"class_codes": (*many, code("x"))},
        {"event_codes": ((code("x"),),) * (conditions.MAX_CONDITIONS + 1)},
        {"author_persons": (*patterns, "%")},
    ):
        with pytest.raises(errors.StoredQueryParamNumber):
            find(loaded, **parameters)


# --- Manifests of a study ---------------------------------------------------------------------------------------------


def test_the_approved_manifests_of_a_study(registry: Registry) -> None:
    study = "1.2.826.0.1.3680043.8.498.7"
    reference = (study_reference(study),)
    old, report = document(reference_ids=reference), document(reference_ids=reference, format_code=code("pdf"))
    target = registry.register(submission(old, report, document())).entry_uuids[old.entry_uuid]
    assert [entry.unique_id for entry in registry.documents_of_study(study)] == [old.unique_id]
    new = document(reference_ids=reference)
    registry.register(submission(new, associations=[association(uids.RPLC, new.entry_uuid, target)]))
    [found] = registry.documents_of_study(study)
    assert found.unique_id == new.unique_id
    assert found.home_community_id == HOME
    assert registry.documents_of_study("1.2.826.0.1.3680043.8.498") == ()
