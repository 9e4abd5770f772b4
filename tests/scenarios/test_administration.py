"""Identity feeds, on-demand entries, updates and removals of a node that serves, by clients of other hands.

HL7 v2 by python-hl7's client; ITI-44, ITI-57, ITI-61, ITI-62 and ITI-86 by zeep from the published WSDLs, which also
reads the answers. zeep knows no substitution groups, so the objects of a submission are hand-written.
"""

from __future__ import annotations

import copy
import json
import sqlite3
import uuid
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import hl7
import pydicom
import pytest
import zeep
from hl7.client import MLLPClient
from lxml import etree

from tests.scenarios.holding import PATIENT_ID, UNIQUE_ID, entries_of, identifier
from tests.support import images, peers, soap_client
from tests.support.node import HOME, REPOSITORY, RETRIEVE_LOCATION, Node, pacs_section
from tests.support.shared import shared_path
from tests.transactions import schemas

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(180),
    # zeep's own, not ours
    pytest.mark.filterwarnings("ignore::DeprecationWarning:zeep.*"),
    pytest.mark.filterwarnings("ignore:.*defusedxml.*"),
]

ON_DEMAND = "urn:uuid:34268e47-fdf5-41a6-ba33-82133c465248"
IS_SNAPSHOT_OF = "urn:ihe:iti:2010:AssociationType:IsSnapshotOf"
RMD = "urn:ihe:iti:rmd:2017"


class Serving:
    """A node that keeps snapshots, one that does not, and the PACS of both."""

    def __init__(self, pacs: Any, keeping: Node, making: Node) -> None:
        self.pacs, self.keeping, self.making = pacs, keeping, making


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    folder = tmp_path_factory.mktemp("administration")
    keeping = Node(
        folder / "keeping",
        {
            "repository": {"persist_on_demand": True},
            "hl7": {"port": peers.free_port()},
            "registry": {"strict_patients": True},
        },
    )
    making = Node(folder / "making", {"dicom": {"ae_title": "MAKING"}})
    with peers.Qrscp(folder / "pacs", [keeping.entity, making.entity]) as pacs:
        for node in (keeping, making):
            node.config["pacs"] = [pacs_section(pacs, assigning_authority=images.AUTHORITY)]
        with keeping, making:
            yield Serving(pacs, keeping, making)


# --- Clients of other hands -------------------------------------------------------------------------------------------


def adt(event: str, patient: str, subsumed: str = "") -> str:
    lines = [
        f"MSH|^~\\&|ADT|HOSPITAL|REGISTRY|XDS|20240229101500||ADT^{event}|{uuid.uuid4().hex[:20]}|P|2.3.1",
        f"EVN|{event}|20240229101500",
        f"PID|||{patient}||SAMPLE^ADA",
    ]
    if subsumed:
        lines.append(f"MRG|{subsumed}")
    return "\r".join(lines) + "\r"


def feed(node: Node, *messages: str) -> list[str]:
    """Send messages over one connection and return the codes of their acknowledgements."""
    found = []
    with MLLPClient(peers.LOOPBACK, node.config["hl7"]["port"]) as client:
        for message in messages:
            answer = client.send_message(message)
            assert answer.startswith(b"\x0b")
            assert answer.endswith(b"\x1c\r")
            acknowledgement = hl7.parse(answer[1:-2].decode())
            assert acknowledgement.extract_field("MSA", 1, 2) == hl7.parse(message).extract_field("MSH", 1, 10)
            found.append(str(acknowledgement.extract_field("MSA", 1, 1)))
    return found


class Objects(zeep.Plugin):
    """Puts hand-written objects into the RegistryObjectList of a request."""

    def __init__(self, submission: str) -> None:
        self._objects = soap_client.parse_xml(submission.encode()).find("rim:RegistryObjectList", soap_client.NS)

    def egress(self, envelope: Any, http_headers: Any, operation: Any, binding_options: Any) -> tuple[Any, Any]:
        (listed,) = envelope.iter(f"{{{soap_client.RIM}}}RegistryObjectList")
        listed.getparent().replace(listed, self._objects)
        return envelope, http_headers


def service(node: Node, wsdl: Path, path: str, *plugins: zeep.Plugin) -> Any:
    """Return the operations of a published WSDL at this node's endpoint."""
    client = zeep.Client(str(wsdl), plugins=plugins)
    (binding,) = client.wsdl.bindings
    return client.create_service(binding, node.url(path))


def codes_of(response: Any) -> list[tuple[str, str]]:
    """Return status and error codes of a RegistryResponse as zeep reads it."""
    errors = response.RegistryErrorList.RegistryError if response.RegistryErrorList else []
    return [(response.status.rpartition(":")[2], each.errorCode) for each in errors] or [
        (response.status.rpartition(":")[2], "")
    ]


def submit(node: Node, transaction: str, submission: str) -> list[tuple[str, str]]:
    """Send a submission by ITI-57 or ITI-61."""
    wsdl = Path(shared_path(f"schemas/ipf-xds/{transaction}.wsdl"))
    operations = service(node, wsdl, "/services/registry", Objects(submission))
    name = {"iti57": "UpdateDocumentSet", "iti61": "RegisterOnDemandDocumentEntry"}[transaction]
    return codes_of(operations[f"DocumentRegistry_{name}"](RegistryObjectList={}))


def remove_metadata(node: Node, ids: list[str]) -> list[tuple[str, str]]:
    operations = service(node, Path(shared_path("schemas/ipf-xds/iti62.wsdl")), "/services/registry")
    references = {"_value_1": [{"ObjectRef": {"id": each}} for each in ids]}
    return codes_of(operations.DocumentRegistry_DeleteDocumentSet(ObjectRefList=references))


def remove_documents(node: Node, *documents: tuple[str, str]) -> list[tuple[str, str]]:
    operations = service(node, Path(shared_path("schemas/ipf-xds/iti86.wsdl")), "/services/repository")
    requests = [{"RepositoryUniqueId": each[0], "DocumentUniqueId": each[1]} for each in documents]
    return codes_of(operations.DocumentRepository_RemoveDocuments(DocumentRequest=requests))


# --- Messages written by hand -----------------------------------------------------------------------------------------


def _slot(name: str, *values: str) -> str:
    listed = "".join(f"<Value>{value.replace('&', '&amp;')}</Value>" for value in values)
    return f'<Slot name="{name}"><ValueList>{listed}</ValueList></Slot>'


def _code(owner: str, scheme: str, code: str, code_scheme: str) -> str:
    return (
        f'<Classification id="{uuid.uuid4()}" classificationScheme="urn:uuid:{scheme}" classifiedObject="{owner}" '
        f'nodeRepresentation="{code}">{_slot("codingScheme", code_scheme)}'
        f'<Name><LocalizedString value="{code}"/></Name></Classification>'
    )


def _identifier(owner: str, scheme: str, value: str, name: str) -> str:
    return (
        f'<ExternalIdentifier id="{uuid.uuid4()}" registryObject="{owner}" identificationScheme="urn:uuid:{scheme}" '
        f'value="{value.replace("&", "&amp;")}"><Name><LocalizedString value="{name}"/></Name></ExternalIdentifier>'
    )


def _submit(patient: str, *objects: str) -> str:
    owner = "SubmissionSet01"
    package = (
        f'<RegistryPackage id="{owner}">{_slot("submissionTime", "20240229120000")}'
        + _code(owner, "aa543740-bdda-424e-8c96-df4873be8500", "imaging", "1.2.3")
        + f'<Classification id="{uuid.uuid4()}" classifiedObject="{owner}" '
        'classificationNode="urn:uuid:a54d6aa5-d40d-43f9-88c5-b4633d873bdd"/>'
        + _identifier(owner, "6b5aea1a-874d-4603-a4bc-96a0a7b38446", patient, "XDSSubmissionSet.patientId")
        + _identifier(owner, "96fdda7c-d067-4183-912e-bf5ee74998a8", images.new_uid(), "XDSSubmissionSet.uniqueId")
        + _identifier(owner, "554ac39e-e3fe-47fe-b233-965d2a147832", "1.2.3.4", "XDSSubmissionSet.sourceId")
        + "</RegistryPackage>"
    )
    text = (
        f'<lcm:SubmitObjectsRequest xmlns:lcm="{soap_client.LCM}" xmlns="{soap_client.RIM}"><RegistryObjectList>'
        f"{package}{''.join(objects)}</RegistryObjectList></lcm:SubmitObjectsRequest>"
    )
    schemas.assert_valid(soap_client.parse_xml(text.encode()))
    return text


def _association(type_: str, target: str, *slots: str) -> str:
    return (
        f'<Association id="Association{uuid.uuid4().hex[:8]}" associationType="{type_}" '
        f'sourceObject="SubmissionSet01" targetObject="{target}">{"".join(slots)}</Association>'
    )


def on_demand_entry(study: images.Study, *, unique_id: str, more: str = "") -> str:
    """Return the submission of an on-demand entry of a study."""
    owner = "Document01"
    codes = (
        ("41a5887f-8865-4c09-adf7-e362475b143a", "IMAGES", "1.3.6.1.4.1.19376.1.2.6.1"),
        ("f4f85eac-e6cb-4883-b524-f2705394840f", "N", "2.16.840.1.113883.5.25"),
        ("a09d5840-386c-46f2-b5ad-9c3699a4309d", "1.2.840.10008.5.1.4.1.1.88.59", "1.2.840.10008.2.6.1"),
        ("f33fb8ac-18af-42cc-ae0e-ed0b0bdb91e1", "hospital", "1.2.3"),
        ("cccf5598-8b07-4b77-a05e-ae952c785ead", "radiology", "1.2.3"),
        ("f0306f51-975f-434e-a61c-c59651d33983", "18748-4", "2.16.840.1.113883.6.1"),
    )
    entry = (
        f'<ExtrinsicObject id="{owner}" mimeType="application/dicom" objectType="{ON_DEMAND}">'
        + _slot("languageCode", "en")
        + _slot("repositoryUniqueId", REPOSITORY)
        + _slot("sourcePatientId", study.cx)
        + _slot("urn:ihe:iti:xds:2013:referenceIdList", f"{study.uid}^^^^urn:ihe:iti:xds:2016:studyInstanceUID")
        + more
        + "".join(_code(owner, *each) for each in codes)
        + _identifier(owner, "58a6f841-87b3-4a3e-92fd-a8ffeff98427", study.cx, "XDSDocumentEntry.patientId")
        + _identifier(owner, "2e82c1f6-a085-4c72-9da3-8640a32e42ab", unique_id, "XDSDocumentEntry.uniqueId")
        + "</ExtrinsicObject>"
    )
    member = _association(
        "urn:oasis:names:tc:ebxml-regrep:AssociationType:HasMember", owner, _slot("SubmissionSetStatus", "Original")
    )
    return _submit(study.cx, entry, member)


def on_demand(serving: Serving, node: Node, folder: Path, count: int = 2) -> tuple[images.Study, str]:
    """Have a study in the PACS and an on-demand entry of it; return the study and the entry's uniqueId."""
    study = images.ct(folder / "ct", count, patient_id=images.new_patient())
    serving.pacs.upload(study.paths[:-1])
    if "hl7" in node.config:
        assert feed(node, adt("A04", study.cx)) == ["AA"]
    unique_id = images.new_uid()
    assert submit(node, "iti61", on_demand_entry(study, unique_id=unique_id)) == [("Success", "")]
    return study, unique_id


def retrieve(node: Node, unique_id: str, *, home: str = "") -> soap_client.Answer:
    transaction = soap_client.ITI39 if home else soap_client.ITI43
    return soap_client.send(node, transaction, soap_client.retrieve_documents([(REPOSITORY, unique_id)], home=home))


def new_ids(answer: soap_client.Answer) -> tuple[str, str]:
    """Return NewRepositoryUniqueId and NewDocumentUniqueId of the one document of an answer."""
    (response,) = answer.body.findall("b:DocumentResponse", soap_client.NS)
    repository = response.findtext("b:NewRepositoryUniqueId", "", soap_client.NS)
    return repository, response.findtext("b:NewDocumentUniqueId", "", soap_client.NS)


def referenced(content: bytes) -> set[str]:
    """Return the SOP Instance UIDs of a manifest's evidence; all of its images are to be had from the PACS's node."""
    (evidence,) = pydicom.dcmread(BytesIO(content)).CurrentRequestedProcedureEvidenceSequence
    series = evidence.ReferencedSeriesSequence
    assert {each.RetrieveLocationUID for each in series} == {RETRIEVE_LOCATION}
    return {item.ReferencedSOPInstanceUID for each in series for item in each.ReferencedSOPSequence}


def objects_of(node: Node, patient: str) -> list[Any]:
    """Return all objects of a patient, by GetAll."""
    both = f"('{soap_client.APPROVED}','{soap_client.DEPRECATED}')"
    slots = {
        "$patientId": f"'{patient}'",
        "$XDSDocumentEntryStatus": both,
        "$XDSSubmissionSetStatus": both,
        "$XDSFolderStatus": both,
        "$XDSDocumentEntryType": f"('{ON_DEMAND}','urn:uuid:7edca82f-054d-47f2-a032-9b2a5b5186c1')",
    }
    answer = soap_client.send(node, soap_client.ITI18, soap_client.stored_query(soap_client.GET_ALL, slots))
    assert answer.registry_status == soap_client.SUCCESS, answer.errors
    return list(answer.body.find("rim:RegistryObjectList", soap_client.NS))


def kind(element: Any) -> str:
    return str(element.tag).rpartition("}")[2]


def read_events(node: Node) -> list[dict[str, Any]]:
    with sqlite3.connect(f"file:{node.data / 'registry.db'}?mode=ro", uri=True) as database:
        rows = database.execute('SELECT "transaction", action, patient_id, facts FROM registry_events ORDER BY id')
        return [{"transaction": row[0], "action": row[1], "patient": row[2], **json.loads(row[3])} for row in rows]


# --- On-demand documents ----------------------------------------------------------------------------------------------


def test_a_manifest_is_of_what_the_pacs_holds_now(serving: Serving, tmp_path: Path) -> None:
    study, unique_id = on_demand(serving, serving.making, tmp_path)
    first = retrieve(serving.making, unique_id)
    assert first.registry_status == soap_client.SUCCESS, first.errors
    document = first.documents[unique_id]
    assert (document.mime_type, document.repository) == ("application/dicom", REPOSITORY)
    assert referenced(document.content) == {each.uid for each in study.instances[:-1]}
    repository, new_unique_id = new_ids(first)
    assert repository == ""
    assert pydicom.dcmread(BytesIO(document.content)).SOPInstanceUID == new_unique_id != unique_id
    serving.pacs.upload(study.paths[-1:])
    second = retrieve(serving.making, unique_id)
    assert referenced(second.documents[unique_id].content) == study.uids
    assert new_ids(second)[1] != new_unique_id
    # Nothing is kept: what was handed out cannot be had again, and the registry has no more than before.
    assert [each.code for each in retrieve(serving.making, new_unique_id).errors] == ["XDSDocumentUniqueIdError"]
    assert entries_of(serving.making, study.cx) == []


def test_another_community_gets_it_too(serving: Serving, tmp_path: Path) -> None:
    study, unique_id = on_demand(serving, serving.making, tmp_path)
    answer = retrieve(serving.making, unique_id, home=HOME)
    assert answer.registry_status == soap_client.SUCCESS, answer.errors
    assert answer.documents[unique_id].home == HOME
    assert new_ids(answer)[1]
    assert referenced(answer.documents[unique_id].content) == {each.uid for each in study.instances[:-1]}


def test_a_snapshot_is_kept_and_registered(serving: Serving, tmp_path: Path) -> None:
    study, unique_id = on_demand(serving, serving.keeping, tmp_path)
    answer = retrieve(serving.keeping, unique_id)
    repository, new_unique_id = new_ids(answer)
    assert repository == REPOSITORY
    again = retrieve(serving.keeping, new_unique_id)
    assert again.documents[new_unique_id].content == answer.documents[unique_id].content
    (entry,) = entries_of(serving.keeping, study.cx)
    assert identifier(entry, UNIQUE_ID) == new_unique_id
    (snapshot_of,) = [
        each for each in objects_of(serving.keeping, study.cx) if each.get("associationType") == IS_SNAPSHOT_OF
    ]
    assert snapshot_of.get("sourceObject") == entry.get("id")
    assert new_ids(retrieve(serving.keeping, unique_id))[1] != new_unique_id
    assert len(entries_of(serving.keeping, study.cx)) == 2
    events = [each for each in read_events(serving.keeping) if unique_id in each["objects"]]
    assert [(each["transaction"], each["action"]) for each in events] == [
        ("ITI-61", "register"),
        ("ITI-43", "retrieve on demand"),
        ("ITI-43", "retrieve on demand"),
    ]
    assert events[1]["objects"] == [unique_id, new_unique_id]
    assert events[1]["persisted"] == "true"


@pytest.mark.parametrize("more", ["creationTime", "hash", "size"])
def test_what_an_on_demand_entry_must_not_say(serving: Serving, tmp_path: Path, more: str) -> None:
    study = images.ct(tmp_path / "ct", 1)
    values = {"creationTime": "20240229", "hash": "da39a3ee5e6b4b0d3255bfef95601890afd80709", "size": "0"}
    body = on_demand_entry(study, unique_id=images.new_uid(), more=_slot(more, values[more]))
    assert submit(serving.making, "iti61", body) == [("Failure", "XDSRegistryMetadataError")]


def test_a_study_that_no_pacs_has(serving: Serving, tmp_path: Path) -> None:
    study = images.ct(tmp_path / "ct", 1, patient_id=images.new_patient())
    unique_id = images.new_uid()
    submit(serving.making, "iti61", on_demand_entry(study, unique_id=unique_id))
    answer = retrieve(serving.making, unique_id)
    assert [(each.code, each.location) for each in answer.errors] == [("XDSDocumentUniqueIdError", unique_id)]


# --- Updates and removals ---------------------------------------------------------------------------------------------


def deprecation(patient: str, entry_uuid: str) -> str:
    return _submit(
        patient,
        _association(
            "urn:ihe:iti:2010:AssociationType:UpdateAvailabilityStatus",
            entry_uuid,
            _slot("OriginalStatus", soap_client.APPROVED),
            _slot("NewStatus", soap_client.DEPRECATED),
        ),
    )


def test_an_entry_that_is_deprecated_is_not_made_any_more(serving: Serving, tmp_path: Path) -> None:
    study, unique_id = on_demand(serving, serving.making, tmp_path)
    (entry,) = [each for each in objects_of(serving.making, study.cx) if kind(each) == "ExtrinsicObject"]
    assert submit(serving.making, "iti57", deprecation(study.cx, entry.get("id"))) == [("Success", "")]
    assert [each.code for each in retrieve(serving.making, unique_id).errors] == ["XDSDocumentUniqueIdError"]
    again = submit(serving.making, "iti57", deprecation(study.cx, entry.get("id")))
    assert again == [("Failure", "XDSMetadataUpdateError")]


def new_version(entry: Any, patient: str, *, title: str, previous: str) -> str:
    """Return the update of an entry as a query has given it."""
    new = copy.deepcopy(entry)
    for element in new.iter():
        for name in ("id", "classifiedObject", "registryObject"):
            if element.get(name) == entry.get("id"):
                element.set(name, "Document01")
            elif name == "id" and element.get(name):
                element.set(name, f"urn:uuid:{uuid.uuid4()}")
    for name in ("status", "home"):
        new.attrib.pop(name, None)
    for version in new.findall("rim:VersionInfo", soap_client.NS):
        new.remove(version)
    (text,) = new.findall("rim:Name/rim:LocalizedString", soap_client.NS)
    text.set("value", title)
    member = _association(
        "urn:oasis:names:tc:ebxml-regrep:AssociationType:HasMember",
        "Document01",
        _slot("SubmissionSetStatus", "Original"),
        _slot("PreviousVersion", previous),
    )
    return _submit(patient, etree.tostring(new).decode(), member)


def test_a_new_version_of_what_was_published(serving: Serving, tmp_path: Path) -> None:
    node = serving.making
    study = images.ct(tmp_path / "ct", 1, patient_id=images.new_patient())
    serving.pacs.upload(study.paths)
    node.publish(study)
    (entry,) = entries_of(node, study.cx)
    assert submit(node, "iti57", new_version(entry, study.cx, title="First change", previous="1")) == [("Success", "")]
    (new,) = entries_of(node, study.cx)
    (old,) = entries_of(node, study.cx, status=(soap_client.DEPRECATED,))
    assert old.get("id") == old.get("lid") == new.get("lid") == entry.get("id") != new.get("id")
    assert new.xpath("string(rim:Name/rim:LocalizedString/@value)", namespaces=soap_client.NS) == "First change"
    assert new.xpath("string(rim:VersionInfo/@versionName)", namespaces=soap_client.NS) == "2"
    assert identifier(new, UNIQUE_ID) == identifier(entry, UNIQUE_ID)
    stale = new_version(entry, study.cx, title="Second change", previous="1")
    assert submit(node, "iti57", stale) == [("Failure", "XDSMetadataVersionError")]
    assert submit(node, "iti57", new_version(new, study.cx, title="Second change", previous="2")) == [("Success", "")]
    assert len(retrieve(node, identifier(entry, UNIQUE_ID)).documents) == 1


def test_a_published_study_is_removed_for_good(serving: Serving, tmp_path: Path) -> None:
    node = serving.making
    study = images.ct(tmp_path / "ct", 1, patient_id=images.new_patient())
    serving.pacs.upload(study.paths)
    node.publish(study)
    (entry,) = entries_of(node, study.cx)
    unique_id = identifier(entry, UNIQUE_ID)
    everything = [each.get("id") for each in objects_of(node, study.cx)]

    assert remove_metadata(node, [entry.get("id")]) == [("Failure", "ReferencesExistException")]
    assert remove_metadata(node, [f"urn:uuid:{uuid.uuid4()}"]) == [("Failure", "UnresolvedReferenceException")]
    assert remove_metadata(node, everything) == [("Success", "")]
    assert objects_of(node, study.cx) == []

    assert len(retrieve(node, unique_id).documents) == 1
    assert remove_documents(node, ("1.2.3.4", unique_id)) == [("Failure", "XDSUnknownRepositoryId")]
    assert remove_documents(node, (REPOSITORY, unique_id), (REPOSITORY, "1.2.3")) == [
        ("PartialSuccess", "XDSDocumentUniqueIdError")
    ]
    assert [each.code for each in retrieve(node, unique_id).errors] == ["XDSDocumentUniqueIdError"]
    assert not [
        path
        for path in (node.data / "documents").rglob("*")
        if path.is_file() and unique_id.encode() in path.read_bytes()
    ]
    _, on_demand_id = on_demand(serving, node, tmp_path / "other")
    assert remove_documents(node, (REPOSITORY, on_demand_id)) == [("Failure", "XDSRemoveDocumentsError")]

    removals = [each for each in read_events(node) if each["transaction"] in ("ITI-62", "ITI-86")]
    done = [each for each in removals if each["outcome"] == "success"]
    assert [each["transaction"] for each in done] == ["ITI-62", "ITI-86"]
    assert done[0]["patient"] == study.cx
    assert done[1]["objects"] == [unique_id]
    assert {each["caller"] for each in removals} == {"local"}
    assert {each["outcome"] for each in removals} == {"success", "refused"}


# --- Patients ---------------------------------------------------------------------------------------------------------


def test_strict_patients_and_a_merge_by_hl7_v2(serving: Serving, tmp_path: Path) -> None:
    node = serving.keeping
    study = images.ct(tmp_path / "ct", 1, patient_id=images.new_patient())
    serving.pacs.upload(study.paths)
    refused = node.run("publish", "--study", study.uid)
    assert refused.returncode == 1
    assert "XDSUnknownPatientId" in refused.stdout + refused.stderr
    assert feed(node, adt("A01", study.cx), adt("A08", study.cx)) == ["AA", "AA"]
    node.publish(study)
    survivor = f"{images.new_patient()}^^^&{images.AUTHORITY}&ISO"
    assert feed(node, adt("A05", survivor), adt("A40", survivor, study.cx), adt("A40", study.cx, survivor)) == [
        "AA",
        "AA",
        "AE",
    ]
    assert entries_of(node, study.cx) == []
    (entry,) = entries_of(node, survivor)
    assert identifier(entry, PATIENT_ID) == survivor
    assert feed(node, adt("A04", study.cx)) == ["AE"]
    assert feed(node, adt("A01", study.cx).replace("ADT^A01", "ORU^R01")) == ["AR"]


def test_a_merge_by_hl7_v3(serving: Serving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # zeep cannot write a value whose type is a union of unions, as that of role classes is.
    monkeypatch.setattr(zeep.xsd.types.UnionType, "xmlvalue", lambda self, value: str(value))
    node = serving.making
    study, unique_id = on_demand(serving, node, tmp_path)
    survivor = f"{images.new_patient()}^^^&{images.AUTHORITY}&ISO"
    operations = service(node, _pix_wsdl(tmp_path), "/services/registry")
    taken = operations.DocumentRegistry_PRPA_IN201304UV02(**_merge_v3(survivor, study.cx))
    assert taken.acknowledgement[0].typeCode.code == "CA"
    assert taken.acknowledgement[0].targetMessage.id.extension == "merge-1"
    assert retrieve(node, unique_id).documents
    assert objects_of(node, study.cx) == []
    assert {kind(each) for each in objects_of(node, survivor)} == {"ExtrinsicObject", "RegistryPackage", "Association"}
    again = operations.DocumentRegistry_PRPA_IN201304UV02(**_merge_v3(study.cx, survivor))
    assert again.acknowledgement[0].typeCode.code == "CE"
    events = [each for each in read_events(node) if each["transaction"] == "ITI-44"]
    assert [(each["action"], each["outcome"]) for each in events] == [("merge", "success"), ("merge", "refused")]


def _pix_wsdl(folder: Path) -> Path:
    published = Path(shared_path("schemas/hl7v3/iti44-xds.wsdl"))
    wsdl = folder / published.name
    # zeep takes no xsd:include in a schema without a namespace of its own; what that file holds are imports.
    imports = "".join(
        f'<xsd:import namespace="urn:hl7-org:v3" schemaLocation="{location}"/>'
        for location in sorted((published.parent / "schema/HL7V3/NE2008/multicacheschemas").glob("*_IN*.xsd"))
    )
    wsdl.write_text(published.read_text("utf-8").replace('<xsd:include schemaLocation="iti44.xsd"/>', imports))
    return wsdl


def _merge_v3(survivor: str, subsumed: str) -> dict[str, Any]:
    def ids(patient: str) -> list[dict[str, str]]:
        return [{"root": images.AUTHORITY, "extension": patient.partition("^")[0]}]

    device = {"classCode": "DEV", "determinerCode": "INSTANCE", "id": [{"root": "1.2.3.4"}]}
    patient = {
        "classCode": "PAT",
        "id": ids(survivor),
        "statusCode": {"code": "active"},
        "patientPerson": {"classCode": "PSN", "determinerCode": "INSTANCE", "name": [{}]},
    }
    prior = {
        "classCode": "REG",
        "moodCode": "EVN",
        "statusCode": {"code": "obsolete"},
        "subject1": {"typeCode": "SBJ", "priorRegisteredRole": {"classCode": "PAT", "id": ids(subsumed)}},
    }
    event = {
        "classCode": "REG",
        "moodCode": "EVN",
        "statusCode": {"code": "active"},
        "subject1": {"typeCode": "SBJ", "patient": patient},
        "custodian": {"typeCode": "CST", "assignedEntity": {"classCode": "ASSIGNED", "id": [{"root": "1.2.3.4"}]}},
        "replacementOf": [{"typeCode": "RPLC", "priorRegistration": prior}],
    }
    return {
        "ITSVersion": "XML_1.0",
        "id": {"root": "1.2.3.4.5", "extension": "merge-1"},
        "creationTime": {"value": "20240301083015"},
        "interactionId": {"root": "2.16.840.1.113883.1.6", "extension": "PRPA_IN201304UV02"},
        "processingCode": {"code": "P"},
        "processingModeCode": {"code": "T"},
        "acceptAckCode": {"code": "AL"},
        "receiver": [{"typeCode": "RCV", "device": device}],
        "sender": {"typeCode": "SND", "device": device},
        "controlActProcess": {
            "classCode": "CACT",
            "moodCode": "EVN",
            "subject": [{"typeCode": "SUBJ", "registrationEvent": event}],
        },
    }
