"""A real PACS (Orthanc) with CT, MR, compressed, multi-frame, SR and private-class objects behind a node."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha1
from pathlib import Path

import pydicom
import pytest

from tests.scenarios.holding import (
    KOS_SOP_CLASS,
    PATIENT_ID,
    STORED_SYNTAXES,
    UNIQUE_ID,
    Holding,
    check_images,
    check_same_dataset,
    codes,
    entries_of,
    identifier,
    manifest,
    manifest_instances,
    rad69,
    rad75,
    slot,
    triples,
)
from tests.support import images, peers, soap_client
from tests.support.node import HOME, REPOSITORY, RETRIEVE_LOCATION, Node, pacs_section

pytestmark = [pytest.mark.peer, pytest.mark.timeout(180)]

KINDS = ["ct", "mr", "compressed", "jpeg_lossless", "multi_frame", "structured_report", "private_class"]


@pytest.fixture(scope="module")
def holding(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Holding]:
    folder = tmp_path_factory.mktemp("orthanc")
    patient = images.new_patient()
    studies = {kind: getattr(images, kind)(folder / kind, patient_id=patient) for kind in KINDS}
    studies["several_series"] = images.dicomdir_series(folder / "several_series")
    node = Node(folder / "node", {"limits": {"stall_timeout": "20s"}})
    with (
        peers.StoreScp(folder / "reference") as reference,
        peers.Orthanc(folder / "pacs", [node.entity, reference.entity]) as pacs,
    ):
        for study in studies.values():
            pacs.upload(study.paths)
        node.config["pacs"] = [pacs_section(pacs)]
        with node:
            yield Holding(pacs, node, reference, studies)


# --------------------------------------------------------------------------------------------------------------------
# Retrieval, without anything published
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*KINDS, "several_series"])
def test_rad69_gives_the_bytes_that_the_pacs_sends(holding: Holding, kind: str) -> None:
    study = holding.studies[kind]
    answer = rad69(holding.node, study.instances)
    check_images(answer, study.instances, holding.as_sent(study), home="")


@pytest.mark.parametrize("kind", ["ct", "compressed"])
def test_rad75_gives_the_same_with_the_home_community(holding: Holding, kind: str) -> None:
    study = holding.studies[kind]
    answer = rad75(holding.node, study.instances)
    check_images(answer, study.instances, holding.as_sent(study), home=HOME)


def test_rad69_repeats_the_home_community_it_was_asked_with(holding: Holding) -> None:
    study = holding.studies["ct"]
    answer = rad69(holding.node, study.instances, home=HOME)
    check_images(answer, study.instances, holding.as_sent(study), home=HOME)


def test_one_instance_of_a_series_comes_alone(holding: Holding) -> None:
    study = holding.studies["ct"]
    wanted = study.instances[2:3]
    check_images(rad69(holding.node, wanted), wanted, holding.as_sent(study), home="")


def test_studies_may_be_mixed_in_one_request(holding: Holding) -> None:
    first, second = holding.studies["ct"], holding.studies["mr"]
    wanted = [first.instances[0], *second.instances]
    reference = {**holding.as_sent(first), **holding.as_sent(second)}
    check_images(rad69(holding.node, wanted), wanted, reference, home="")


def test_a_request_in_plain_soap_is_understood(holding: Holding) -> None:
    """transactions.md section 1: a plain request on an MTOM endpoint is common practice, so it is read."""
    study = holding.studies["ct"]
    answer = rad69(holding.node, study.instances, mtom=False, check=False)
    assert not answer.is_fault, answer.fault_text
    assert set(answer.documents) == study.uids


# --------------------------------------------------------------------------------------------------------------------
# Transfer syntaxes
# --------------------------------------------------------------------------------------------------------------------


def test_only_a_listed_transfer_syntax_is_delivered(holding: Holding) -> None:
    """Asked for uncompressed and then for JPEG lossless only, the node gives each time one of those asked for.

    Orthanc can decode JPEG lossless for a receiver that accepts nothing else: what comes is a listed syntax either
    way, or an error. The second request must not be served with what the first one left in the spool.
    """
    study = holding.studies["jpeg_lossless"]
    for listed in ([soap_client.EXPLICIT_LE], ["1.2.840.10008.1.2.4.70"], [soap_client.EXPLICIT_LE]):
        answer = rad69(holding.node, study.instances, transfer_syntaxes=listed)
        documents = answer.documents
        assert set(documents) == study.uids, (listed, answer.errors)
        assert {images.transfer_syntax(each.content) for each in documents.values()} == set(listed)


def test_what_was_decoded_for_one_request_does_not_serve_another(holding: Holding, tmp_path: Path) -> None:
    """RAD-69: stored in a listed syntax, sent as is, whoever asked for something else before."""
    study = images.jpeg_lossless(tmp_path, 1)
    holding.pacs.upload(study.paths)
    reference = holding.as_sent(study)
    decoded = rad69(holding.node, study.instances, transfer_syntaxes=[soap_client.EXPLICIT_LE])
    assert set(decoded.documents) == study.uids
    check_images(rad69(holding.node, study.instances), study.instances, reference, home="")


def test_what_cannot_be_delivered_in_a_listed_syntax_is_an_error_for_that_document(holding: Holding) -> None:
    """Orthanc without a codec cannot turn JPEG 2000 or JPEG-LS into anything: the others come, these are named."""
    study = holding.studies["compressed"]
    listed = ["1.2.840.10008.1.2.4.50"]
    answer = rad69(holding.node, study.instances, transfer_syntaxes=listed)
    (jpeg,) = [each for each in study.instances if each.transfer_syntax in listed]
    documents, errors = answer.documents, answer.errors
    assert set(documents) == {jpeg.uid}
    assert images.transfer_syntax(documents[jpeg.uid].content) == listed[0]
    assert answer.registry_status == soap_client.PARTIAL
    assert {error.location for error in errors} == study.uids - {jpeg.uid}
    assert len(errors) == len(study.uids) - 1
    for error in errors:
        assert error.code == "XDSRepositoryError"
        assert "yntax" in error.context, error.context


def test_no_instance_in_a_listed_syntax_is_a_failure(holding: Holding) -> None:
    study = holding.studies["ct"]
    answer = rad69(holding.node, study.instances, transfer_syntaxes=["1.2.840.10008.1.2.4.90"])
    assert answer.registry_status == soap_client.FAILURE
    assert {(e.code, e.location) for e in answer.errors} == {("XDSRepositoryError", uid) for uid in study.uids}


# --------------------------------------------------------------------------------------------------------------------
# Wrong requests
# --------------------------------------------------------------------------------------------------------------------


def test_each_unknown_instance_is_named(holding: Holding) -> None:
    study = holding.studies["ct"]
    unknown = [replace(study.instances[0], uid=images.new_uid()) for _ in range(3)]
    answer = rad69(holding.node, [*study.instances[:2], *unknown])
    assert answer.registry_status == soap_client.PARTIAL
    assert set(answer.documents) == {each.uid for each in study.instances[:2]}
    assert sorted((e.code, e.location) for e in answer.errors) == sorted(
        ("XDSDocumentUniqueIdError", each.uid) for each in unknown
    )


@pytest.mark.parametrize("wrong", ["uid", "series", "study"])
def test_a_wrong_uid_is_a_failure(holding: Holding, wrong: str) -> None:
    """RAD-69: unknown, or not in the named series or study."""
    instance = holding.studies["ct"].instances[0]
    answer = rad69(holding.node, [replace(instance, **{wrong: images.new_uid()})])
    assert answer.registry_status == soap_client.FAILURE
    (error,) = answer.errors
    assert error.code == "XDSDocumentUniqueIdError"
    assert not answer.documents


def test_an_instance_in_another_existing_study_is_an_error(holding: Holding) -> None:
    instance, other = holding.studies["ct"].instances[0], holding.studies["mr"].instances[0]
    answer = rad69(holding.node, [replace(instance, study=other.study, series=other.series)])
    assert answer.registry_status == soap_client.FAILURE
    assert [(e.code, e.location) for e in answer.errors] == [("XDSDocumentUniqueIdError", instance.uid)]


@pytest.mark.parametrize("transaction", ["rad69", "rad75"])
def test_an_unknown_repository_is_a_failure(holding: Holding, transaction: str) -> None:
    call = {"rad69": rad69, "rad75": rad75}[transaction]
    answer = call(holding.node, holding.studies["ct"].instances[:1], repository=f"{RETRIEVE_LOCATION}.999")
    assert answer.registry_status == soap_client.FAILURE
    assert {error.code for error in answer.errors} == {"XDSUnknownRepositoryId"}


def test_rad75_names_the_community_and_the_instance_in_each_error(holding: Holding) -> None:
    study = holding.studies["ct"]
    unknown = replace(study.instances[0], uid=images.new_uid())
    answer = rad75(holding.node, [study.instances[0], unknown])
    assert answer.registry_status == soap_client.PARTIAL
    (error,) = answer.errors
    assert error.code == "XDSDocumentUniqueIdError"
    assert error.location == HOME
    assert unknown.uid in error.context


@pytest.mark.parametrize(
    ("home", "code"),
    [("", "XDSMissingHomeCommunityId"), ("urn:oid:1.3.6.1.4.1.21367.2017.999", "XDSUnknownCommunity")],
)
def test_rad75_wants_its_own_home_community(holding: Holding, home: str, code: str) -> None:
    answer = rad75(holding.node, holding.studies["ct"].instances[:1], home=home)
    assert answer.registry_status == soap_client.FAILURE
    assert {error.code for error in answer.errors} == {code}


# --------------------------------------------------------------------------------------------------------------------
# Publishing
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_published_study_is_found_with_its_manifest(holding: Holding, kind: str) -> None:
    study = holding.publish(kind)
    (found,) = [each for each in holding.node.query(study.cx) if each["study_instance_uid"] == study.uid]
    assert found["patient_id"] == study.cx
    assert found["repository_unique_id"] == REPOSITORY
    assert found["mime_type"] == "application/dicom"
    assert found["status"].endswith("Approved")
    assert KOS_SOP_CLASS in found["format_code"]
    assert {"title", "creation_time", "home_community_id", "unique_id"} <= found.keys()
    _, dataset = manifest(holding.node, found["unique_id"])
    assert manifest_instances(dataset) == triples(study)


def test_the_manifest_is_as_the_profile_says(holding: Holding) -> None:
    """RAD TF-3 4.68.4.1.2, PS3.3 C.17.6, PS3.16 TID 2010."""
    study = holding.publish("ct")
    (found,) = [each for each in holding.node.query(study.cx) if each["study_instance_uid"] == study.uid]
    content, kos = manifest(holding.node, found["unique_id"])
    original = pydicom.dcmread(study.paths[0])
    assert content[:128] == bytes(128)
    assert kos.SOPClassUID == KOS_SOP_CLASS
    assert kos.SOPInstanceUID == found["unique_id"]
    assert kos.Modality == "KO"
    assert kos.StudyInstanceUID == study.uid
    assert kos.SeriesInstanceUID not in study.series
    for keyword in ("PatientName", "PatientID", "PatientBirthDate", "PatientSex"):
        assert kos[keyword].value == original[keyword].value
    (title,) = kos.ConceptNameCodeSequence
    assert (title.CodeValue, title.CodingSchemeDesignator) == ("113030", "DCM")
    assert (kos.ValueType, kos.ContinuityOfContent) == ("CONTAINER", "SEPARATE")
    (evidence,) = kos.CurrentRequestedProcedureEvidenceSequence
    assert evidence.StudyInstanceUID == study.uid
    listed = [series.SeriesInstanceUID for series in evidence.ReferencedSeriesSequence]
    assert sorted(listed) == sorted(study.series)
    for series in evidence.ReferencedSeriesSequence:
        assert series.RetrieveAETitle == holding.pacs.ae_title
        assert series.RetrieveLocationUID == RETRIEVE_LOCATION
        for sop in series.ReferencedSOPSequence:
            assert sop.ReferencedSOPClassUID == original.SOPClassUID
    tree = {
        (item.ReferencedSOPSequence[0].ReferencedSOPClassUID, item.ReferencedSOPSequence[0].ReferencedSOPInstanceUID)
        for item in kos.ContentSequence
        if item.ValueType in ("IMAGE", "COMPOSITE", "WAVEFORM")
    }
    assert tree == {(each.sop_class, each.uid) for each in study.instances}


def test_the_entry_is_as_the_profile_says(holding: Holding) -> None:
    """RAD TF-3 4.68.4.1.2.3.2: from the manifest to the entry."""
    study = holding.publish("ct")
    (entry,) = [
        each
        for each in entries_of(holding.node, study.cx)
        if any(study.uid in value for value in slot(each, "urn:ihe:iti:xds:2013:referenceIdList"))
    ]
    unique_id = identifier(entry, UNIQUE_ID)
    content, _ = manifest(holding.node, unique_id)
    assert entry.get("mimeType") == "application/dicom"
    assert entry.get("objectType") == "urn:uuid:7edca82f-054d-47f2-a032-9b2a5b5186c1"
    assert entry.get("status") == soap_client.APPROVED
    assert entry.get("id").startswith("urn:uuid:")
    assert identifier(entry, PATIENT_ID) == study.cx
    assert slot(entry, "sourcePatientId") == [study.cx]
    assert slot(entry, "repositoryUniqueId") == [REPOSITORY]
    assert slot(entry, "size") == [str(len(content))]
    assert [each.lower() for each in slot(entry, "hash")] == [sha1(content, usedforsecurity=False).hexdigest()]
    assert f"{study.uid}^^^^urn:ihe:iti:xds:2016:studyInstanceUID" in slot(
        entry, "urn:ihe:iti:xds:2013:referenceIdList"
    )
    assert codes(entry, "urn:uuid:a09d5840-386c-46f2-b5ad-9c3699a4309d") == [(KOS_SOP_CLASS, "1.2.840.10008.2.6.1")]
    events = codes(entry, "urn:uuid:2c6b8cb7-8b2a-4051-b291-b1ae6a575ef4")
    assert ("CT", "1.2.840.10008.2.16.4") in events
    assert "KO" not in {code for code, _ in events}
    for scheme in (
        "urn:uuid:41a5887f-8865-4c09-adf7-e362475b143a",
        "urn:uuid:f0306f51-975f-434e-a61c-c59651d33983",
        "urn:uuid:cccf5598-8b07-4b77-a05e-ae952c785ead",
        "urn:uuid:f33fb8ac-18af-42cc-ae0e-ed0b0bdb91e1",
        "urn:uuid:f4f85eac-e6cb-4883-b524-f2705394840f",
    ):
        assert codes(entry, scheme), f"no classification of {scheme}"
    (created,) = slot(entry, "creationTime")
    assert created.isdigit()
    assert len(created) in (8, 10, 12, 14)


def test_publishing_an_unchanged_study_again_changes_nothing(holding: Holding) -> None:
    study = holding.publish("mr")
    both = (soap_client.APPROVED, soap_client.DEPRECATED)
    before = {identifier(each, UNIQUE_ID) for each in entries_of(holding.node, study.cx, status=both)}
    holding.node.publish(study)
    assert {identifier(each, UNIQUE_ID) for each in entries_of(holding.node, study.cx, status=both)} == before


def test_publish_takes_every_study_of_a_patient(holding: Holding, tmp_path: Path) -> None:
    patient = images.new_patient()
    studies = [images.ct(tmp_path / str(n), 2, patient_id=patient) for n in range(3)]
    for study in studies:
        holding.pacs.upload(study.paths)
    holding.node.ok("publish", "--patient", patient)
    assert {each["study_instance_uid"] for each in holding.node.query(studies[0].cx)} == {s.uid for s in studies}


def test_publish_as_another_patient(holding: Holding, tmp_path: Path) -> None:
    """The affinity domain's id differs from the department's; the department's stays in sourcePatientId."""
    study = images.ct(tmp_path, 1)
    holding.pacs.upload(study.paths)
    other = f"AD-{study.patient_id}^^^&1.3.6.1.4.1.21367.2005.13.20.2000&ISO"
    holding.node.publish(study, "--as", other)
    assert holding.node.query(study.cx) == []
    (entry,) = entries_of(holding.node, other)
    assert slot(entry, "sourcePatientId") == [study.cx]


def test_a_grown_study_replaces_its_manifest(holding: Holding, tmp_path: Path) -> None:
    study = images.ct(tmp_path, 3)
    holding.pacs.upload(study.paths[:2])
    holding.node.publish(study)
    (old,) = [identifier(each, UNIQUE_ID) for each in entries_of(holding.node, study.cx)]
    holding.pacs.upload(study.paths[2:])
    holding.node.publish(study)
    (new,) = [identifier(each, UNIQUE_ID) for each in entries_of(holding.node, study.cx)]
    (gone,) = [identifier(e, UNIQUE_ID) for e in entries_of(holding.node, study.cx, status=[soap_client.DEPRECATED])]
    assert gone == old != new
    assert manifest_instances(manifest(holding.node, new)[1]) == triples(study)
    both = f"('{soap_client.APPROVED}','{soap_client.DEPRECATED}')"
    body = soap_client.stored_query(
        soap_client.GET_ALL,
        {
            "$patientId": f"'{study.cx}'",
            "$XDSDocumentEntryStatus": both,
            "$XDSSubmissionSetStatus": both,
            "$XDSFolderStatus": both,
        },
    )
    answer = soap_client.send(holding.node, soap_client.ITI18, body)
    replacements = answer.body.xpath(
        "rim:RegistryObjectList/rim:Association[@associationType='urn:ihe:iti:2007:AssociationType:RPLC']",
        namespaces=soap_client.NS,
    )
    by_id = {each.get("id"): identifier(each, UNIQUE_ID) for each in answer.entries}
    assert [(by_id[a.get("sourceObject")], by_id[a.get("targetObject")]) for a in replacements] == [(new, old)]


def test_a_shrunk_study_replaces_its_manifest(holding: Holding, tmp_path: Path) -> None:
    study = images.ct(tmp_path, 3)
    holding.pacs.upload(study.paths)
    holding.node.publish(study)
    holding.pacs.delete(study.instances[0].uid)
    holding.node.publish(study)
    (new,) = entries_of(holding.node, study.cx)
    listed = manifest_instances(manifest(holding.node, identifier(new, UNIQUE_ID))[1])
    assert listed == {(each.study, each.series, each.uid) for each in study.instances[1:]}
    gone = study.instances[0]
    answer = rad69(holding.node, study.instances)
    assert [(e.code, e.location) for e in answer.errors] == [("XDSDocumentUniqueIdError", gone.uid)]


def test_a_study_without_instances_is_refused(holding: Holding, tmp_path: Path) -> None:
    study = images.ct(tmp_path, 2)
    holding.pacs.upload(study.paths)
    holding.pacs.delete(study.uid)
    done = holding.node.run("publish", "--study", study.uid)
    assert done.returncode not in (0, 2), done.stdout + done.stderr
    assert study.uid in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert holding.node.query(study.cx) == []


# --------------------------------------------------------------------------------------------------------------------
# The retrieve command
# --------------------------------------------------------------------------------------------------------------------


def _check_written(holding: Holding, study: images.Study, receipt: object) -> None:
    receipt.check(study.instances)  # type: ignore[attr-defined]
    reference = holding.as_sent(study)
    for each in receipt.content["instances"]:  # type: ignore[attr-defined]
        written = receipt.path(each).read_bytes()  # type: ignore[attr-defined]
        check_same_dataset(written, reference[each["sop_instance_uid"]])
        assert each["transfer_syntax_uid"] == images.transfer_syntax(written)


@pytest.mark.parametrize("kind", KINDS)
def test_retrieve_a_study(holding: Holding, tmp_path: Path, kind: str) -> None:
    study = holding.publish(kind)
    receipt = holding.node.retrieve(tmp_path / "out", "--study", study.uid)
    _check_written(holding, study, receipt)
    assert receipt.content["manifest"]["document_unique_id"]


def test_retrieve_all_of_a_patient(holding: Holding, tmp_path: Path) -> None:
    first, second = holding.publish("ct"), holding.publish("mr")
    receipt = holding.node.retrieve(tmp_path / "out", "--patient", first.cx)
    receipt.check()
    assert receipt.instances.keys() >= first.uids | second.uids


def test_retrieve_by_a_manifest_file(holding: Holding, tmp_path: Path) -> None:
    from hashlib import sha256

    study = holding.publish("mr")
    (found,) = [each for each in holding.node.query(study.cx) if each["study_instance_uid"] == study.uid]
    content, _ = manifest(holding.node, found["unique_id"])
    file = tmp_path / "manifest.dcm"
    file.write_bytes(content)
    receipt = holding.node.retrieve(tmp_path / "out", "--manifest", str(file))
    _check_written(holding, study, receipt)
    assert receipt.content["manifest"]["sha256"] == sha256(content).hexdigest()


def test_retrieve_by_the_manifests_identifiers(holding: Holding, tmp_path: Path) -> None:
    study = holding.publish("ct")
    (found,) = [each for each in holding.node.query(study.cx) if each["study_instance_uid"] == study.uid]
    receipt = holding.node.retrieve(
        tmp_path / "out",
        *("--document", found["unique_id"], "--repository", found["repository_unique_id"], "--home", HOME),
    )
    _check_written(holding, study, receipt)
    listed = receipt.content["manifest"]
    assert listed["document_unique_id"] == found["unique_id"]
    assert listed["repository_unique_id"] == REPOSITORY


def test_retrieve_is_incomplete_when_the_pacs_lost_an_instance(holding: Holding, tmp_path: Path) -> None:
    study = images.ct(tmp_path / "study", 3)
    holding.pacs.upload(study.paths)
    holding.node.publish(study)
    lost = study.instances[1].uid
    holding.pacs.delete(lost)
    receipt = holding.node.retrieve(tmp_path / "out", "--study", study.uid)
    receipt.check(study.instances, complete=False)
    assert {uid for uid, each in receipt.instances.items() if each["state"] == "failed"} == {lost}


def test_stored_syntaxes_cover_the_test_objects(holding: Holding) -> None:
    """The list that the byte comparisons ask with leaves no reason to transcode."""
    lying = {each.transfer_syntax for study in holding.studies.values() for each in study.instances}
    assert lying <= set(STORED_SYNTAXES)
