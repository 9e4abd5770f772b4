"""Queries start from an index, whatever they ask: SQLite's own plans say so."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy.dialects import sqlite

from tests.registry.samples import HOME, PATIENT, code
from tests.registry.test_search import ACCESSION, STUDY, load
from xca_imaging import uids
from xca_imaging.metadata.stored_query import FindDocuments, FindDocumentsForMultiplePatients
from xca_imaging.registry import Registry, conditions


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    path: Path = tmp_path_factory.mktemp("plans") / "registry.db"
    registry = Registry.open(f"sqlite:///{path}", home_community_id=HOME)
    load(registry)
    yield registry
    registry.close()


def plan(registry: Registry, query: FindDocuments | FindDocumentsForMultiplePatients) -> list[str]:
    """Return SQLite's steps for a query."""
    patients = [query.patient_id] if isinstance(query, FindDocuments) else query.patient_ids
    statement = conditions.find_documents(query, patients)
    compiled = str(
        statement.compile(
            dialect=sqlite.dialect(),  # type: ignore[no-untyped-call]
            compile_kwargs={"literal_binds": True},
        )
    )
    with registry.database.reading() as connection:
        return [row.detail for row in connection.exec_driver_sql("EXPLAIN QUERY PLAN " + compiled.replace("%", "%%"))]


def test_find_documents_starts_from_the_patient_and_scans_nothing(loaded: Registry) -> None:
    steps = plan(
        loaded,
        FindDocuments(
            patient_id=PATIENT,
            status=(uids.APPROVED, uids.DEPRECATED),
            class_codes=(code("a"), code("b")),
            event_codes=((code("x"),), (code("y"),)),
            confidentiality_codes=((code("N"),),),
            author_persons=("%Ada%",),
            creation_time_from="2024",
            service_start_time_to="2025",
        ),
    )
    assert any("ix_registry_objects_patient_id_kind_status (patient_id=? AND kind=? AND status=?)" in s for s in steps)
    assert not [step for step in steps if step.startswith("SCAN")]


def test_find_documents_by_reference_id_uses_the_index_of_reference_ids(loaded: Registry) -> None:
    query = FindDocuments(patient_id=PATIENT, status=(uids.APPROVED,), reference_ids=((STUDY,), (ACCESSION,)))
    steps = plan(loaded, query)
    assert [step for step in steps if "document_reference_ids USING PRIMARY KEY (reference_id=?" in step]
    assert not [step for step in steps if step.startswith("SCAN")]


def test_a_search_over_all_patients_starts_from_a_code(loaded: Registry) -> None:
    for asked, index in (
        ({"class_codes": (code("a"),)}, "ix_document_entries_class_code (class_code=?)"),
        (
            {"healthcare_facility_type_codes": (code("a"),)},
            "ix_document_entries_healthcare_facility_type_code (healthcare_facility_type_code=?)",
        ),
        ({"event_codes": ((code("x"),),)}, "ix_document_event_codes_code (code=?)"),
    ):
        query = FindDocumentsForMultiplePatients(status=(uids.APPROVED,), **asked)  # type: ignore[arg-type]
        steps = plan(loaded, query)
        assert any(index in step for step in steps), steps
        assert not [step for step in steps if step.startswith("SCAN")]
