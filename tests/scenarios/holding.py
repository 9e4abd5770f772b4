"""A PACS, a node in front of it, and what the scenario tests check of them.

The same checks run against Orthanc, DCMTK and pynetdicom: only what the PACS itself cannot do is left out, by name.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import pydicom

from tests.support import images, peers, soap_client
from tests.support.node import REPOSITORY, RETRIEVE_LOCATION, Node

KOS_SOP_CLASS = "1.2.840.10008.5.1.4.1.1.88.59"

# Every transfer syntax in which the test objects lie: nothing has to be transcoded.
STORED_SYNTAXES = (
    "1.2.840.10008.1.2.1",
    "1.2.840.10008.1.2",
    "1.2.840.10008.1.2.5",
    "1.2.840.10008.1.2.4.50",
    "1.2.840.10008.1.2.4.70",
    "1.2.840.10008.1.2.4.80",
    "1.2.840.10008.1.2.4.90",
    "1.2.840.10008.1.2.4.91",
)

UNIQUE_ID = "urn:uuid:2e82c1f6-a085-4c72-9da3-8640a32e42ab"
PATIENT_ID = "urn:uuid:58a6f841-87b3-4a3e-92fd-a8ffeff98427"


@dataclass
class Holding:
    """A PACS with studies, a reference receiver and a node."""

    pacs: Any
    node: Node
    reference: peers.StoreScp
    studies: dict[str, images.Study]
    published: set[str] = field(default_factory=set)

    def publish(self, name: str) -> images.Study:
        """Publish a study once."""
        study = self.studies[name]
        if name not in self.published:
            self.node.publish(study)
            self.published.add(name)
        return study

    def as_sent(self, study: images.Study) -> dict[str, bytes]:
        """Return what the PACS sends of a study to a receiver that changes no bit, by SOP Instance UID."""
        for file in self.reference.received.iterdir():
            file.unlink()
        peers.movescu(self.pacs, self.reference.ae_title, study.uid)
        return {uid: file.read_bytes() for uid, file in self.reference.files().items()}


def check_same_dataset(part10: bytes, reference: bytes) -> None:
    """The dataset is, byte for byte, what the reference receiver got; so is what the file meta says of it."""
    got, expected = (pydicom.dcmread(BytesIO(each), stop_before_pixels=True).file_meta for each in (part10, reference))
    assert got.MediaStorageSOPInstanceUID == expected.MediaStorageSOPInstanceUID
    assert got.MediaStorageSOPClassUID == expected.MediaStorageSOPClassUID
    assert got.TransferSyntaxUID == expected.TransferSyntaxUID
    assert images.dataset_bytes(part10) == images.dataset_bytes(reference)


def rad69(
    node: Node, instances: Iterable[Any], *, transfer_syntaxes: Iterable[str] = STORED_SYNTAXES, **more: Any
) -> soap_client.Answer:
    """Ask the node's Imaging Document Source for instances."""
    body = soap_client.retrieve_images(
        instances,
        repository=more.pop("repository", RETRIEVE_LOCATION),
        home=more.pop("home", ""),
        transfer_syntaxes=transfer_syntaxes,
    )
    return soap_client.send(node, soap_client.RAD69, body, **more)


def rad75(
    node: Node, instances: Iterable[Any], *, transfer_syntaxes: Iterable[str] = STORED_SYNTAXES, **more: Any
) -> soap_client.Answer:
    """Ask the node's Responding Imaging Gateway for instances."""
    body = soap_client.retrieve_images(
        instances,
        repository=more.pop("repository", RETRIEVE_LOCATION),
        home=more.pop("home", node.home),
        transfer_syntaxes=transfer_syntaxes,
    )
    return soap_client.send(node, soap_client.RAD75, body, **more)


def check_images(
    answer: soap_client.Answer,
    wanted: Iterable[Any],
    reference: dict[str, bytes],
    *,
    home: str,
    repository: str = RETRIEVE_LOCATION,
) -> None:
    """Everything wanted came, whole, and nothing else."""
    instances = list(wanted)
    assert answer.registry_status == soap_client.SUCCESS, answer.errors
    documents = answer.documents
    assert set(documents) == {each.uid for each in instances}
    for each in instances:
        document = documents[each.uid]
        assert document.repository == repository
        assert document.home == home
        assert document.mime_type == "application/dicom"
        check_same_dataset(document.content, reference[each.uid])


def entries_of(
    node: Node, patient: str, *, status: Iterable[str] = (soap_client.APPROVED,), return_type: str = "LeafClass"
) -> list[Any]:
    """Return the document entries of a patient in this node's registry, by ITI-18."""
    answer = soap_client.send(
        node, soap_client.ITI18, soap_client.find_documents(patient, status=status, return_type=return_type)
    )
    assert answer.registry_status == soap_client.SUCCESS, answer.errors
    return answer.entries


def identifier(entry: Any, scheme: str) -> str:
    """Return the value of an ExternalIdentifier of a registry object."""
    (found,) = entry.xpath(
        "rim:ExternalIdentifier[@identificationScheme=$s]/@value", s=scheme, namespaces=soap_client.NS
    )
    return str(found)


def slot(entry: Any, name: str) -> list[str]:
    """Return the values of a slot."""
    return [
        str(value)
        for value in entry.xpath("rim:Slot[@name=$n]/rim:ValueList/rim:Value/text()", n=name, namespaces=soap_client.NS)
    ]


def codes(entry: Any, scheme: str) -> list[tuple[str, str]]:
    """Return (code, coding scheme) of the classifications of one scheme."""
    return [
        (each.get("nodeRepresentation"), slot(each, "codingScheme")[0])
        for each in entry.xpath("rim:Classification[@classificationScheme=$s]", s=scheme, namespaces=soap_client.NS)
    ]


def manifest(node: Node, unique_id: str, *, repository: str = REPOSITORY) -> tuple[bytes, pydicom.Dataset]:
    """Return a manifest of this node's repository, by ITI-43."""
    answer = soap_client.send(node, soap_client.ITI43, soap_client.retrieve_documents([(repository, unique_id)]))
    assert answer.registry_status == soap_client.SUCCESS, answer.errors
    content = answer.documents[unique_id].content
    return content, pydicom.dcmread(BytesIO(content))


def manifest_instances(dataset: pydicom.Dataset) -> set[tuple[str, str, str]]:
    """Return (study, series, instance) of the evidence sequence of a manifest."""
    return {
        (study.StudyInstanceUID, series.SeriesInstanceUID, sop.ReferencedSOPInstanceUID)
        for study in dataset.CurrentRequestedProcedureEvidenceSequence
        for series in study.ReferencedSeriesSequence
        for sop in series.ReferencedSOPSequence
    }


def triples(study: images.Study) -> set[tuple[str, str, str]]:
    return {(each.study, each.series, each.uid) for each in study.instances}


def files_below(folder: Path) -> dict[str, int]:
    """Return the files below a folder with their sizes: what a request left on disk shows here."""
    found = {}
    for file in folder.rglob("*"):
        with suppress(FileNotFoundError):  # removed meanwhile
            if file.is_file():
                found[str(file.relative_to(folder))] = file.stat().st_size
    return found
