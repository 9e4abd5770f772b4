"""idc_2018: the node's `retrieve` command as Document Consumer and Imaging Document Consumer, seen on the wire."""

from __future__ import annotations

from conformance.environment import REPOSITORY, SOURCE, Environment, Seen, recorder
from tests.support import soap_client
from tests.support.soap_client import NS, RIM, XDSB, XDSI


def _run(environment: Environment, name: str, out: str) -> list[Seen]:
    study = environment.publish(name)
    with recorder(environment.node) as (base, seen):
        receipt = environment.node.retrieve(
            environment.folder / out,
            *("--patient", study.facts["xds_patient_id"]),
            *("--registry-url", f"{base}/services/registry"),
            *("--repository-url", f"{base}/services/repository"),
            *("--imaging-url", f"{base}/services/imaging-source"),
        )
    receipt.check(study.instances)
    return seen


def _one(seen: list[Seen], action: str) -> soap_client.Answer:
    (found,) = [each.answer_form for each in seen if each.answer_form.header("Action") == action]
    return found


def query_and_manifest(environment: Environment) -> None:
    """4831a: FindDocuments for the patient, then ITI-43 for the KOS found."""
    seen = _run(environment, "ids_single", "4831a")
    patient = environment.studies["ids_single"].facts["xds_patient_id"]
    query = _one(seen, soap_client.ITI18.action).body
    assert query.find(f"{{{RIM}}}AdhocQuery").get("id") == soap_client.FIND_DOCUMENTS
    asked = query.xpath("//rim:Slot[@name='$XDSDocumentEntryPatientId']//rim:Value/text()", namespaces=NS)
    assert asked == [f"'{patient}'"]
    entry = soap_client.send(environment.node, soap_client.ITI18, soap_client.find_documents(patient)).entries[0]
    unique_id = entry.xpath("rim:ExternalIdentifier[contains(@identificationScheme,'2e82c1f6')]/@value", namespaces=NS)
    retrieve = _one(seen, soap_client.ITI43.action)
    assert retrieve.is_mtom
    assert [each.text for each in retrieve.body.iter(f"{{{XDSB}}}DocumentUniqueId")] == unique_id
    assert [each.text for each in retrieve.body.iter(f"{{{XDSB}}}RepositoryUniqueId")] == [REPOSITORY]


def images(environment: Environment) -> None:
    """4833a: RAD-69 for the one image of a KOS."""
    seen = _run(environment, "ids_single", "4833a")
    request = _one(seen, soap_client.RAD69.action)
    assert request.is_mtom
    study = environment.studies["ids_single"]
    (instance,) = study.instances
    body = request.body
    assert [each.get("studyInstanceUID") for each in body.iter(f"{{{XDSI}}}StudyRequest")] == [study.uid]
    assert [each.get("seriesInstanceUID") for each in body.iter(f"{{{XDSI}}}SeriesRequest")] == [instance.series]
    assert [each.text for each in body.iter(f"{{{XDSB}}}DocumentUniqueId")] == [instance.uid]
    assert [each.text for each in body.iter(f"{{{XDSB}}}RepositoryUniqueId")] == [SOURCE]
    syntaxes = [each.text for each in body.iter(f"{{{XDSI}}}TransferSyntaxUID")]
    assert syntaxes
    assert all(syntaxes)
    last = body[-1]
    assert last.tag == f"{{{XDSI}}}TransferSyntaxUIDList", "the list stands after all studies"


FAMILY = "imaging document consumer"
CASES = {"idc_2018-4831a": query_and_manifest, "idc_2018-4833a": images}
