"""ids_2018: the node as Imaging Document Source (RAD-69) and as the one who publishes manifests (RAD-68)."""

from __future__ import annotations

from io import BytesIO

import pydicom

from conformance.environment import (
    ACCESSION_AUTHORITY,
    DEPARTMENT,
    HOME,
    REPOSITORY,
    SOURCE,
    Environment,
    check_documents,
    check_failure,
)
from tests.support import soap_client
from tests.support.soap_client import NS, RAD69

KOS = "1.2.840.10008.5.1.4.1.1.88.59"
EVENT_CODES = "urn:uuid:2c6b8cb7-8b2a-4051-b291-b1ae6a575ef4"


def _values(entry: object, slot: str) -> list[str]:
    return entry.xpath("rim:Slot[@name=$n]/rim:ValueList/rim:Value/text()", n=slot, namespaces=NS)  # type: ignore[attr-defined, no-any-return]


def _codes(entry: object, scheme: str) -> list[tuple[str, str]]:
    found = entry.xpath("rim:Classification[@classificationScheme=$s]", s=scheme, namespaces=NS)  # type: ignore[attr-defined]
    return [(each.get("nodeRepresentation"), _values(each, "codingScheme")[0]) for each in found]


def published_manifest(environment: Environment, name: str) -> None:
    """4801a: the KOS of a study and the metadata it is registered with (cases.md 3.1)."""
    study = environment.publish(name)
    facts = study.facts
    originals = [pydicom.dcmread(each.path, stop_before_pixels=True) for each in study.instances]
    query = soap_client.find_documents(facts["xds_patient_id"])
    found = soap_client.send(environment.node, soap_client.ITI18, query)
    assert found.registry_status == soap_client.SUCCESS
    (entry,) = found.entries

    unique_id = entry.xpath("rim:ExternalIdentifier[contains(@identificationScheme,'2e82c1f6')]/@value", namespaces=NS)[
        0
    ]
    assert entry.get("mimeType") == "application/dicom"
    assert entry.get("objectType") == "urn:uuid:7edca82f-054d-47f2-a032-9b2a5b5186c1"
    assert _codes(entry, "urn:uuid:a09d5840-386c-46f2-b5ad-9c3699a4309d") == [(KOS, "1.2.840.10008.2.6.1")]
    for scheme in (
        "urn:uuid:41a5887f-8865-4c09-adf7-e362475b143a",
        "urn:uuid:f4f85eac-e6cb-4883-b524-f2705394840f",
        "urn:uuid:f33fb8ac-18af-42cc-ae0e-ed0b0bdb91e1",
        "urn:uuid:cccf5598-8b07-4b77-a05e-ae952c785ead",
        "urn:uuid:f0306f51-975f-434e-a61c-c59651d33983",
    ):
        assert _codes(entry, scheme), f"no code of {scheme}"
    references = _values(entry, "urn:ihe:iti:xds:2013:referenceIdList")
    assert f"{facts['accession']}^^^&{ACCESSION_AUTHORITY}&ISO^urn:ihe:iti:xds:2013:accession" in references, references
    assert _values(entry, "sourcePatientId") == [f"{facts['patient_id']}^^^&{DEPARTMENT}&ISO"]
    modalities = {each.Modality for each in originals}
    regions = {str(each.get("BodyPartExamined", "")) for each in originals} - {""}
    events = _codes(entry, EVENT_CODES)
    assert {(code, scheme) for code, scheme in events if scheme == "1.2.840.10008.2.16.4"} == {
        (modality, "1.2.840.10008.2.16.4") for modality in modalities
    }
    assert len(events) - len(modalities) <= len(regions), f"codes that are not in the images: {events}"
    procedures = {code.CodeValue for each in originals for code in each.get("ProcedureCodeSequence", [])}
    if len(procedures) == 1:
        assert {code for code, _ in _codes(entry, "urn:uuid:f0306f51-975f-434e-a61c-c59651d33983")} == procedures

    body = soap_client.retrieve_documents([(REPOSITORY, unique_id)])
    answer = soap_client.send(environment.node, soap_client.ITI43, body)
    kos = pydicom.dcmread(BytesIO(answer.documents[unique_id].content))
    assert kos.SOPClassUID == KOS
    assert kos.SOPInstanceUID == unique_id
    assert kos.Modality == "KO"
    for keyword in (
        "PatientName",
        "PatientID",
        "PatientBirthDate",
        "PatientSex",
        "AccessionNumber",
        "StudyInstanceUID",
    ):
        assert kos[keyword].value == originals[0][keyword].value, keyword
    (evidence,) = kos.CurrentRequestedProcedureEvidenceSequence
    assert evidence.StudyInstanceUID == study.uid
    listed = {
        (series.SeriesInstanceUID, sop.ReferencedSOPClassUID, sop.ReferencedSOPInstanceUID)
        for series in evidence.ReferencedSeriesSequence
        for sop in series.ReferencedSOPSequence
    }
    assert listed == {(each.SeriesInstanceUID, each.SOPClassUID, each.SOPInstanceUID) for each in originals}
    assert len(evidence.ReferencedSeriesSequence) == len({series for series, _, _ in listed})
    assert kos.SeriesInstanceUID not in {series for series, _, _ in listed}
    for series in evidence.ReferencedSeriesSequence:
        assert series.RetrieveAETitle
        assert series.RetrieveLocationUID == SOURCE


def retrieve(environment: Environment, name: str) -> None:
    """4803a, 4811 case 0: what the request names, and nothing else."""
    body = environment.body(name)
    answer = soap_client.send(environment.node, RAD69, body)
    check_documents(answer, environment, body, repository=SOURCE, home="")


def retrieve_with_home(environment: Environment, name: str) -> None:
    """4820: a source takes requests with a home community id as well, and repeats it."""
    body = environment.body(name).replace(
        "<xdsb:RepositoryUniqueId>", f"<xdsb:HomeCommunityId>{HOME}</xdsb:HomeCommunityId><xdsb:RepositoryUniqueId>"
    )
    answer = soap_client.send(environment.node, RAD69, body)
    check_documents(answer, environment, body, repository=SOURCE, home=HOME)


def refused(environment: Environment, name: str, code: str) -> None:
    """4811 cases 1 and 2."""
    check_failure(soap_client.send(environment.node, RAD69, environment.body(name)), code)


FAMILY = "imaging document source"
CASES = {
    "ids_2018-4801a (ids_single)": lambda e: published_manifest(e, "ids_single"),
    "ids_2018-4801a (ids_pet)": lambda e: published_manifest(e, "ids_pet"),
    "ids_2018-4802a": None,
    "ids_2018-4802b": None,
    "ids_2018-4803a": lambda e: retrieve(e, "rad69-single.xml"),
    "ids_2018-4810 case 0": None,
    "ids_2018-4810 case 1": None,
    "ids_2018-4810 case 4": None,
    "ids_2018-4811 case 0": lambda e: retrieve(e, "rad69-multi.xml"),
    "ids_2018-4811 case 1": lambda e: refused(e, "rad69-wrong-repository.xml", "XDSUnknownRepositoryId"),
    "ids_2018-4811 case 2": lambda e: refused(e, "rad69-unknown-instance.xml", "XDSDocumentUniqueIdError"),
    "ids_2018-4820": lambda e: retrieve_with_home(e, "rad69-single.xml"),
}
