"""Stored queries for packages and along associations: what each returns, and what it leaves out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from sqlalchemy import update

from tests.registry.conftest import NOW, NewUrl
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
    submission,
)
from tests.registry.test_search import ON_DEMAND
from tests.transactions import schemas
from xca_imaging import errors, uids
from xca_imaging.metadata.model import Association, Author, DocumentEntry, Folder, SubmissionSet
from xca_imaging.metadata.stored_query import (
    FindDocumentsForMultiplePatients,
    FindFolders,
    FindFoldersForMultiplePatients,
    FindSubmissionSets,
    GetAssociations,
    GetDocuments,
    GetDocumentsAndAssociations,
    GetFolderAndContents,
    GetFolders,
    GetFoldersForDocument,
    GetRelatedDocuments,
    GetSubmissionSetAndContents,
    GetSubmissionSets,
    Query,
    StoredQuery,
)
from xca_imaging.registry import Registry
from xca_imaging.registry.tables import ObjectRow
from xca_imaging.transactions import iti18
from xca_imaging.transactions.registry_response import response_to
from xca_imaging.wire import xml

APPROVED = (uids.APPROVED,)
BOTH = (uids.APPROVED, uids.DEPRECATED)
ANY_TYPE = (uids.STABLE_DOCUMENT, uids.ON_DEMAND_DOCUMENT)


@dataclass
class Loaded:
    """A registry, and the entryUUIDs and uniqueIds of what is in it by its name here."""

    registry: Registry
    uuids: dict[str, str] = field(default_factory=dict)
    unique_ids: dict[str, str] = field(default_factory=dict)

    def register(self, *items: DocumentEntry | Folder, name: str, on_demand: bool = False, **more: Any) -> None:
        documents = [item for item in items if isinstance(item, DocumentEntry)]
        folders = [item for item in items if isinstance(item, Folder)]
        sent = submission(*documents, folders=folders, **more)
        found = self.registry.register(sent, on_demand=on_demand).entry_uuids
        self.uuids |= {item.entry_uuid: found[item.entry_uuid] for item in (*items, *sent.associations)}
        self.unique_ids |= {item.entry_uuid: item.unique_id for item in items}
        [packaged] = sent.submission_sets
        self.uuids[name], self.unique_ids[name] = found[packaged.entry_uuid], packaged.unique_id

    def names(self, query: Query) -> list[str]:
        """Return the names of what a query finds; associations are `source>target`. References are the same."""
        answer = self.registry.query(StoredQuery(query))
        found = decoded(answer.fragments)
        body = xml.parse(b"".join(iti18.encode_response_fragments(response_to(), answer.fragments)))
        schemas.assert_valid(body)
        refs = self.registry.query(StoredQuery(query, "ObjectRef")).refs
        assert [ref.id for ref in refs] == [item.entry_uuid for item in found]
        assert {ref.home_community_id for ref in refs} <= {HOME}
        by_uuid = {entry_uuid: name for name, entry_uuid in self.uuids.items()}

        def name(item: Any) -> str:
            if isinstance(item, Association):
                ends = [by_uuid.get(end, "?") for end in (item.source, item.target)]
                return ">".join("member" if end.startswith("Association") else end for end in ends)
            return by_uuid[item.entry_uuid]

        return sorted(map(name, found))


@pytest.fixture(scope="module")
def loaded(new_url: NewUrl) -> Iterator[Loaded]:
    """Two documents in a folder; a replacement, an addendum, a snapshot of an on-demand entry; another patient."""
    load = Loaded(Registry.open(new_url(), home_community_id=HOME, now=lambda: NOW))
    a, b = document(entry_uuid="a"), document(entry_uuid="b", format_code=code("pdf"))
    load.register(
        a,
        b,
        folder(entry_uuid="F", codes=(code("oncology"), code("chest"))),
        name="S1",
        associations=[*into_folder("F", "a"), *into_folder("F", "b")],
        submission_time="20240101",
        authors=(Author(person="^Sample^Ada"),),
    )
    load.register(folder(entry_uuid="G", codes=(code("chest"),)), name="S2", source_id="1.2.3", submission_time="2025")
    load.register(
        document(entry_uuid="addendum", confidentiality_codes=(code("R"),)),
        name="S3",
        content_type_code=code("report"),
        associations=[
            association(uids.APND, "addendum", load.uuids["b"]),
            association(uids.HAS_MEMBER, "SubmissionSet", load.uuids["b"], submission_set_status="Reference"),
        ],
    )
    load.register(document(entry_uuid="on-demand", **ON_DEMAND), name="S4", on_demand=True)
    snapshot = association(uids.IS_SNAPSHOT_OF, "snapshot", load.uuids["on-demand"])
    load.register(document(entry_uuid="snapshot"), name="S5", associations=[snapshot])
    load.register(
        document(entry_uuid="c"), name="S6", associations=[association(uids.RPLC, "c", load.uuids["a"])]
    )  # takes a's place in F
    other = {"patient_id": OTHER_PATIENT}
    load.register(
        document(entry_uuid="other", event_codes=(code("x"),), **other),
        folder(entry_uuid="O", codes=(code("other"),), **other),
        name="S7",
        associations=into_folder("O", "other"),
        **other,
    )
    yield load
    load.registry.close()


# --- FindSubmissionSets, FindFolders ----------------------------------------------------------------------------------


def sets(load: Loaded, **asked: Any) -> set[str]:
    return set(load.names(FindSubmissionSets(**{"patient_id": PATIENT, "status": APPROVED, **asked})))


def test_submission_sets(loaded: Loaded) -> None:
    everything = {"S1", "S2", "S3", "S4", "S5", "S6"}
    assert sets(loaded) == everything
    assert sets(loaded, patient_id=OTHER_PATIENT) == {"S7"}
    assert sets(loaded, status=(uids.DEPRECATED,)) == set()
    assert sets(loaded, source_ids=("1.2.3",)) == {"S2"}
    assert sets(loaded, source_ids=("1.2.3", "1.3.6.1.4.1.21367.2017.9")) == everything
    assert sets(loaded, content_type_codes=(code("report"),)) == {"S3"}
    assert sets(loaded, content_type_codes=(code("report", "9.9"),)) == set()
    assert sets(loaded, content_type_codes=(code("report"), code("imaging"))) == everything
    assert sets(loaded, author_person="^Sample^Ada") == {"S1"}
    assert sets(loaded, author_person="%Ada%") == everything


def test_submission_times_are_from_inclusive_to_exclusive(loaded: Loaded) -> None:
    assert sets(loaded, submission_time_to="20240101") == set()
    assert sets(loaded, submission_time_to="20240102") == {"S1"}
    assert sets(loaded, submission_time_from="2025") == {"S2"}
    assert sets(loaded, submission_time_from="2024", submission_time_to="20250101000000") == {
        "S1",
        "S3",
        "S4",
        "S5",
        "S6",
    }


def folders(load: Loaded, **asked: Any) -> set[str]:
    return set(load.names(FindFolders(**{"patient_id": PATIENT, "status": APPROVED, **asked})))


def test_folders(loaded: Loaded) -> None:
    chest, oncology = code("chest"), code("oncology")
    assert folders(loaded) == {"F", "G"}
    assert folders(loaded, patient_id=OTHER_PATIENT) == {"O"}
    assert folders(loaded, status=(uids.DEPRECATED,)) == set()
    assert folders(loaded, codes=((oncology,),)) == {"F"}
    assert folders(loaded, codes=((oncology, chest),)) == {"F", "G"}
    assert folders(loaded, codes=((oncology,), (chest,))) == {"F"}
    now = NOW.strftime("%Y%m%d%H%M%S")
    assert folders(loaded, last_update_time_from=now) == {"F", "G"}
    assert folders(loaded, last_update_time_to=now) == set()


# --- By ids -----------------------------------------------------------------------------------------------------------


def test_folders_by_their_ids(loaded: Loaded) -> None:
    f, g = loaded.uuids["F"], loaded.uuids["G"]
    assert loaded.names(GetFolders(entry_uuids=(f, g, loaded.uuids["a"]))) == ["F", "G"]
    assert loaded.names(GetFolders(unique_ids=(loaded.unique_ids["G"],))) == ["G"]
    assert loaded.names(GetFolders(logical_ids=(f,))) == ["F"]
    assert loaded.names(GetDocuments(logical_ids=(loaded.uuids["a"],))) == ["a"]


def test_associations_of_objects(loaded: Loaded) -> None:
    assert loaded.names(GetAssociations(uuids=(loaded.uuids["snapshot"],))) == ["S5>snapshot", "snapshot>on-demand"]
    assert loaded.names(GetAssociations(uuids=(loaded.uuids["G"], loaded.uuids["on-demand"]))) == [
        "S2>G",
        "S4>on-demand",
        "snapshot>on-demand",
    ]
    assert loaded.names(GetAssociations(uuids=("urn:uuid:00000000-1111-4222-8333-444444444444",))) == []


def test_documents_with_their_associations(loaded: Loaded) -> None:
    around_b = ["F>b", "S1>b", "S3>b", "addendum>b", "b"]
    assert loaded.names(GetDocumentsAndAssociations(entry_uuids=(loaded.uuids["b"],))) == around_b
    assert loaded.names(GetDocumentsAndAssociations(unique_ids=(loaded.unique_ids["b"],))) == around_b
    assert loaded.names(GetDocumentsAndAssociations(unique_ids=("1.2.3",))) == []


def test_the_submission_sets_of_objects_with_memberships(loaded: Loaded) -> None:
    assert loaded.names(GetSubmissionSets(uuids=(loaded.uuids["b"],))) == ["S1", "S1>b", "S3", "S3>b"]
    assert loaded.names(GetSubmissionSets(uuids=(loaded.uuids["b"], loaded.uuids["F"]))) == [
        "S1",
        "S1>F",
        "S1>b",
        "S3",
        "S3>b",
    ]


@pytest.mark.parametrize("by", ["entry_uuid", "unique_id"])
def test_a_submission_set_with_its_contents(loaded: Loaded, by: str) -> None:
    ids = loaded.uuids if by == "entry_uuid" else loaded.unique_ids

    def contents(name: str, **asked: Any) -> list[str]:
        return loaded.names(GetSubmissionSetAndContents(**{by: ids[name]}, **asked))

    everything = ["F", "F>a", "F>b", "S1", "S1>F", "S1>a", "S1>b", "S1>member", "S1>member", "a", "b"]
    assert contents("S1") == everything
    # What a filter leaves out takes its associations along (3.18.4.1.2.3.7.10).
    assert contents("S1", format_codes=(KOS,)) == ["F", "F>a", "S1", "S1>F", "S1>a", "S1>member", "a"]
    assert contents("S1", confidentiality_codes=((code("R"),),)) == ["F", "S1", "S1>F"]
    assert contents("S3") == ["S3", "S3>addendum", "S3>b", "addendum", "b"]
    assert contents("S4") == ["S4"]
    assert contents("S4", types=ANY_TYPE) == ["S4", "S4>on-demand", "on-demand"]


def test_the_membership_that_a_replacement_got_is_content_of_its_submission(loaded: Loaded) -> None:
    """But the folder is not: that was submitted before, and an association shows only between returned objects."""
    assert loaded.names(GetSubmissionSetAndContents(entry_uuid=loaded.uuids["S6"])) == ["S6", "S6>c", "c"]


@pytest.mark.parametrize("by", ["entry_uuid", "unique_id"])
def test_a_folder_with_its_contents(loaded: Loaded, by: str) -> None:
    ids = loaded.uuids if by == "entry_uuid" else loaded.unique_ids
    query = GetFolderAndContents(**{by: ids["F"]})
    assert loaded.names(query) == ["F", "F>a", "F>b", "F>c", "a", "b", "c"]
    assert loaded.names(GetFolderAndContents(**{by: ids["F"]}, format_codes=(code("pdf"),))) == ["F", "F>b", "b"]
    assert loaded.names(GetFolderAndContents(**{by: ids["G"]})) == ["G"]
    assert loaded.names(GetFolderAndContents(**{by: ids["S1"]})) == []


def test_the_folders_of_a_document(loaded: Loaded) -> None:
    assert loaded.names(GetFoldersForDocument(entry_uuid=loaded.uuids["c"])) == ["F"]
    assert loaded.names(GetFoldersForDocument(unique_id=loaded.unique_ids["b"])) == ["F"]
    assert loaded.names(GetFoldersForDocument(entry_uuid=loaded.uuids["snapshot"])) == []


def test_related_documents(loaded: Loaded) -> None:
    def related(name: str, *types: str, **asked: Any) -> list[str]:
        by_id = loaded.names(GetRelatedDocuments(entry_uuid=loaded.uuids[name], association_types=types, **asked))
        by = GetRelatedDocuments(unique_id=loaded.unique_ids[name], association_types=types, **asked)
        assert loaded.names(by) == by_id
        return by_id

    assert related("a", uids.RPLC) == ["a", "c", "c>a"]
    assert related("c", uids.RPLC, uids.APND) == ["a", "c", "c>a"]
    assert related("b", uids.APND) == ["addendum", "addendum>b", "b"]
    assert related("b", uids.RPLC) == []  # then not even the document itself
    assert related("b", uids.HAS_MEMBER) == []  # both ends must be documents
    assert related("snapshot", uids.IS_SNAPSHOT_OF) == []
    assert related("snapshot", uids.IS_SNAPSHOT_OF, types=ANY_TYPE) == ["on-demand", "snapshot", "snapshot>on-demand"]


def test_leaves_by_ids_may_not_mix_patients(loaded: Loaded) -> None:
    for query in (
        GetFolders(entry_uuids=(loaded.uuids["F"], loaded.uuids["O"])),
        GetDocumentsAndAssociations(entry_uuids=(loaded.uuids["a"], loaded.uuids["other"])),
        GetSubmissionSets(uuids=(loaded.uuids["a"], loaded.uuids["other"])),
    ):
        with pytest.raises(errors.ResultNotSinglePatient):
            loaded.registry.query(StoredQuery(query))
        assert loaded.registry.query(StoredQuery(query, "ObjectRef")).refs
    mixed = GetAssociations(uuids=(loaded.uuids["G"], loaded.uuids["O"]))  # no patient's: no mixture
    assert loaded.names(mixed) == ["O>other", "S2>G", "S7>O"]


def test_deprecated_associations_are_for_those_who_ask(registry: Registry) -> None:
    load = Loaded(registry)
    load.register(document(entry_uuid="d"), folder(entry_uuid="E"), name="S", associations=into_folder("E", "d"))
    [found] = [
        item
        for item in decoded(registry.query(StoredQuery(GetAssociations(uuids=(load.uuids["E"],)))).fragments)
        if isinstance(item, Association) and item.source == load.uuids["E"]
    ]
    with registry.database.writing() as connection:
        deprecated = update(ObjectRow).where(ObjectRow.entry_uuid == found.entry_uuid).values(status="Deprecated")
        connection.execute(deprecated)
    entry, case = load.uuids["d"], load.uuids["E"]
    assert load.names(GetFolderAndContents(entry_uuid=case)) == ["E"]
    assert load.names(GetFolderAndContents(entry_uuid=case, association_status=BOTH)) == ["E", "E>d", "d"]
    assert load.names(GetFoldersForDocument(entry_uuid=entry)) == []
    assert load.names(GetFoldersForDocument(entry_uuid=entry, association_status=BOTH)) == ["E"]
    assert load.names(GetAssociations(uuids=(entry,))) == ["S>d"]
    assert load.names(GetAssociations(uuids=(entry,), association_status=(uids.DEPRECATED,))) == ["E>d"]


def test_limits_count_what_is_returned(new_url: NewUrl) -> None:
    registry = Registry.open(new_url(), home_community_id=HOME, max_results=5)
    load = Loaded(registry)
    load.register(document(entry_uuid="d"), document(entry_uuid="e", format_code=code("pdf")), name="S")
    query = GetSubmissionSetAndContents(entry_uuid=load.uuids["S"])
    assert len(registry.query(StoredQuery(query)).fragments) == 5
    load.register(*(document(entry_uuid=f"x{number}", format_code=KOS) for number in range(4)), name="T")
    query = GetSubmissionSetAndContents(entry_uuid=load.uuids["T"])
    with pytest.raises(errors.TooManyResults):
        registry.query(StoredQuery(query))
    narrow = GetSubmissionSetAndContents(entry_uuid=load.uuids["T"], format_codes=(code("pdf"),))
    assert len(registry.query(StoredQuery(narrow)).fragments) == 1
    assert len(registry.query(StoredQuery(query, "ObjectRef")).refs) == 9
    registry.close()


# --- Several patients -------------------------------------------------------------------------------------------------


def test_documents_of_several_patients(loaded: Loaded) -> None:
    def find(**asked: Any) -> list[str]:
        return loaded.names(FindDocumentsForMultiplePatients(status=APPROVED, **asked))

    assert find(patient_ids=(PATIENT, OTHER_PATIENT), class_codes=(code("images"),)) == [
        "addendum",
        "b",
        "c",
        "other",
        "snapshot",
    ]
    assert find(patient_ids=(OTHER_PATIENT,)) == ["other"]
    assert find(event_codes=((code("x"),),)) == ["other"]
    assert find(class_codes=(code("images"),), event_codes=((code("x"), code("y")),)) == ["other"]
    assert find(healthcare_facility_type_codes=(code("hospital"),), format_codes=(code("pdf"),)) == ["b"]


def test_folders_of_several_patients(loaded: Loaded) -> None:
    def find(**asked: Any) -> list[str]:
        return loaded.names(FindFoldersForMultiplePatients(status=APPROVED, **asked))

    assert find(patient_ids=(PATIENT, OTHER_PATIENT)) == ["F", "G", "O"]
    assert find(codes=((code("other"), code("oncology")),)) == ["F", "O"]
    assert find(patient_ids=(OTHER_PATIENT,), codes=((code("chest"),),)) == []


def test_kinds_come_in_their_order(loaded: Loaded) -> None:
    query = GetSubmissionSetAndContents(entry_uuid=loaded.uuids["S1"])
    kinds = [type(item) for item in decoded(loaded.registry.query(StoredQuery(query)).fragments)]
    assert kinds == sorted(kinds, key=[SubmissionSet, DocumentEntry, Folder, Association].index)
