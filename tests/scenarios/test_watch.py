"""A node that follows a real PACS (Orthanc): studies that grow, shrink, are rejected, and go; restarts and crashes."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import pydicom
import pytest
import requests
from pydicom.dataset import Dataset
from pynetdicom import AE

from tests.scenarios.holding import UNIQUE_ID, entries_of, identifier, manifest, manifest_instances
from tests.support import images, peers, rejection, reports, soap_client
from tests.support.node import REPOSITORY, Node, environment, pacs_section

pytestmark = [pytest.mark.peer, pytest.mark.slow, pytest.mark.timeout(240)]

AVAILABILITY = "1.2.840.10008.5.1.4.33"
SOON = 30.0  # seconds: some sweeps of one second each, on a busy machine


class Scene:
    """Orthanc and a node in front of it; studies are of today."""

    def __init__(self, folder: Path, **publish: Any) -> None:
        self.folder = folder
        self.node = Node(folder / "node", {"publish": {"interval": "1s", "days": 1, **publish}})
        self.pacs = peers.Orthanc(folder / "pacs", [self.node.entity])
        self.node.config["pacs"] = [pacs_section(self.pacs)]

    def study(self, name: str, count: int = 2, *, of: images.Study | None = None) -> images.Study:
        """Return a new CT study of today, or another series of a study."""
        study = images.ct(self.folder / name, count)
        for instance in study.instances:
            ds = pydicom.dcmread(instance.path)
            ds.StudyDate, ds.StudyTime = f"{date.today():%Y%m%d}", "080000"
            if of is not None:
                ds.StudyInstanceUID, ds.PatientID = of.uid, of.patient_id
            ds.save_as(instance.path, enforce_file_format=True)
        return study

    def upload(self, study: images.Study) -> None:
        self.pacs.upload(study.paths)

    def entries(self, study: images.Study, *status: str) -> dict[str, str]:
        """Return the documents of the patient, approved if nothing else is said: MIME type by unique id."""
        found = entries_of(self.node, study.cx, status=status or (soap_client.APPROVED,))
        return {identifier(each, UNIQUE_ID): each.get("mimeType") for each in found}

    def listed(self, study: images.Study) -> set[str] | None:
        """Return the instances that the one approved manifest names; None where there is none."""
        found = [uid for uid, mime_type in self.entries(study).items() if mime_type == "application/dicom"]
        assert len(found) <= 1, found
        if not found:
            return None
        return {uid for _, _, uid in manifest_instances(manifest(self.node, found[0])[1])}

    def wait(self, study: images.Study, expected: set[str] | None) -> None:
        peers.wait_until(lambda: self.listed(study) == expected, SOON, f"manifest of {expected}", 0.2)

    def metric(self, name: str) -> float:
        """Return a metric of the node, summed over its labels."""
        text = requests.get(self.node.url("/metrics"), timeout=10).text
        return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(name))


@contextmanager
def scene(folder: Path, **publish: Any) -> Iterator[Scene]:
    made = Scene(folder, **publish)
    with made.pacs, made.node:
        yield made


def document(node: Node, unique_id: str) -> bytes:
    """Return a document of the node's repository, by ITI-43."""
    answer = soap_client.send(node, soap_client.ITI43, soap_client.retrieve_documents([(REPOSITORY, unique_id)]))
    return answer.documents[unique_id].content


def reject(study: images.Study, *uids: str, code: str = "113001") -> Dataset:
    note = rejection.note(study.uid, {study.instances[0].series: uids}, code=code, patient_id=study.patient_id)
    note.StudyDate, note.StudyTime = f"{date.today():%Y%m%d}", "080000"
    return note


def notify(node: Node, study: images.Study, ae_title: str = "ORTHANC", **changes: Any) -> int:
    """Send an Instance Availability Notification with pynetdicom and return the status."""
    sops = []
    for instance in study.instances:
        sop = Dataset()
        sop.ReferencedSOPClassUID, sop.ReferencedSOPInstanceUID = instance.sop_class, instance.uid
        sop.InstanceAvailability, sop.RetrieveAETitle = "ONLINE", ae_title
        sops.append(sop)
    series = Dataset()
    series.SeriesInstanceUID, series.ReferencedSOPSequence = study.instances[0].series, sops
    ds = Dataset()
    ds.ReferencedPerformedProcedureStepSequence = []
    ds.StudyInstanceUID, ds.ReferencedSeriesSequence = study.uid, [series]
    for keyword, value in changes.items():
        setattr(ds, keyword, value)
    entity = AE(ae_title=ae_title)
    entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = 30
    entity.add_requested_context(AVAILABILITY)
    association = entity.associate("127.0.0.1", node.dicom_port, ae_title=node.entity.ae_title)
    assert association.is_established
    try:
        status, _ = association.send_n_create(ds, AVAILABILITY, images.new_uid())
    finally:
        association.release()
    return int(status.Status)


def test_a_study_through_its_life(tmp_path: Path) -> None:
    with scene(tmp_path, watch=True) as at:
        study = at.study("first")
        at.upload(study)
        at.wait(study, study.uids)

        late = at.study("late", of=study)
        at.upload(late)
        at.wait(study, study.uids | late.uids)

        gone = study.instances[0].uid
        at.pacs.delete(gone)
        at.wait(study, (study.uids | late.uids) - {gone})

        note = reject(study, study.instances[1].uid)
        at.pacs.upload([rejection.write(note, tmp_path / "note")])
        at.wait(study, late.uids)
        registered = at.metric("xca_imaging_published_total")

        # a note that is taken back
        at.pacs.delete(note.SOPInstanceUID)
        at.wait(study, {study.instances[1].uid} | late.uids)
        assert at.metric("xca_imaging_published_total") == registered + 1

        at.pacs.delete(study.uid)
        at.wait(study, None)
        assert at.metric('xca_imaging_published_total{outcome="withdrawn"') == 1
        assert len(at.entries(study, soap_client.DEPRECATED)) == 5


def test_a_restart_and_a_crash_register_nothing_again(tmp_path: Path) -> None:
    with scene(tmp_path, watch=True) as at:
        studies = [at.study(f"study{number}", 1) for number in range(8)]
        for study in studies:
            at.upload(study)
        peers.wait_until(lambda: at.metric("xca_imaging_published_total") >= 2, SOON, "two studies", 0.02)
        assert at.node.process is not None
        at.node.process.kill()  # in the middle of a sweep
        at.node.process.wait()
        at.node.start()
        for study in studies:
            at.wait(study, study.uids)
        first = [at.entries(study) for study in studies]
        assert at.node.terminate() == 0
        at.node.start()
        sweeps = 'xca_imaging_sweeps_total{outcome="done"'
        peers.wait_until(lambda: at.metric(sweeps) >= 4, SOON, "sweeps", 0.2)
        assert at.metric("xca_imaging_published_total") == 0
        assert [at.entries(study, soap_client.APPROVED, soap_client.DEPRECATED) for study in studies] == first


def test_a_dead_pacs_is_waited_for(tmp_path: Path) -> None:
    with scene(tmp_path, watch=True) as at:
        study = at.study("first")
        at.upload(study)
        at.wait(study, study.uids)
        with peers.paused(at.pacs.daemon):
            requests.get(at.node.url("/health/live"), timeout=5).raise_for_status()
        at.pacs.kill()
        failed = 'xca_imaging_sweeps_total{outcome="failed"'
        peers.wait_until(lambda: at.metric(failed) >= 2, SOON, "failed sweeps", 0.2)
        assert "sweep given up" in at.node.tail()
        assert at.listed(study) == study.uids
        at.pacs.start()
        late = at.study("late", of=study)
        at.upload(late)
        at.wait(study, study.uids | late.uids)


def test_a_notified_study_is_published_without_a_sweep(tmp_path: Path) -> None:
    with scene(tmp_path) as at:
        study = at.study("first")
        assert notify(at.node, study) == 0x0000  # too early: the archive does not have it yet
        at.upload(study)
        at.wait(study, study.uids)
        assert at.metric("xca_imaging_sweeps_total") == 0
        late = at.study("late", of=study)
        at.upload(late)
        assert notify(at.node, study, ae_title="MODALITY") == 0x0000
        at.wait(study, study.uids | late.uids)
        at.pacs.delete(study.uid)
        assert notify(at.node, study) == 0x0000
        at.wait(study, None)


def test_a_notification_that_breaks_the_standard_is_refused(tmp_path: Path) -> None:
    with scene(tmp_path) as at:
        study = at.study("first")
        assert notify(at.node, study, ReferencedSeriesSequence=[]) == 0x0121
        assert notify(at.node, study, StudyInstanceUID="") == 0x0121
        assert at.metric("xca_imaging_notified_studies") == 0


def test_by_hand_and_drift(tmp_path: Path) -> None:
    with scene(tmp_path) as at:
        study, other = at.study("first"), at.study("other")
        at.upload(study)
        at.upload(other)

        def drift(*arguments: str) -> dict[str, list[str]]:
            done = at.node.run("drift", "--json", *arguments)
            found = json.loads(done.stdout)
            assert found.pop("since")
            kinds = {kind: sorted(each["study_instance_uid"] for each in listed) for kind, listed in found.items()}
            assert done.returncode == (1 if any(kinds.values()) else 0), done.stderr
            return {kind: listed for kind, listed in kinds.items() if listed}

        assert drift() == {"in_pacs_not_registered": sorted([study.uid, other.uid])}
        assert "registered" in at.node.publish(study)
        assert drift() == {"in_pacs_not_registered": [other.uid]}
        at.node.publish(other)
        assert drift() == {}
        assert at.node.run("drift").stdout.strip() == "no drift"
        assert "unchanged" in at.node.publish(study)

        # another image with as many instances as before: only the list of them tells
        replaced = at.study("replaced", 1, of=study)
        at.pacs.delete(study.instances[0].uid)
        at.upload(replaced)
        assert drift("--deep") == {"other_content": [study.uid]}
        note = reject(other, other.instances[0].uid, code="113037")
        at.pacs.upload([rejection.write(note, tmp_path / "note")])
        assert drift() == {"other_content": sorted([study.uid, other.uid])}
        table = at.node.run("drift").stdout
        assert "registered with other content" in table
        assert "2 instances are registered, 1 are there" in table
        assert "replaced" in at.node.publish(study)
        assert "2 rejected" in at.node.publish(other)
        assert drift("--deep") == {}
        assert at.listed(other) == {other.instances[1].uid}

        at.pacs.delete(study.uid)
        at.pacs.upload([rejection.write(reject(other, other.instances[1].uid), tmp_path / "note2")])
        assert drift() == {"registered_not_in_pacs": sorted([study.uid, other.uid])}
        assert "withdrawn" in at.node.publish(study)
        assert "withdrawn" in at.node.publish(other)
        assert drift() == {}
        assert at.listed(study) is at.listed(other) is None

        at.pacs.kill()
        done = at.node.run("drift", "--json")
        assert done.returncode == 1
        assert "given up" in json.loads(done.stdout)["not_compared"][0]["reason"]


def test_reports_are_registered_beside_the_manifest(tmp_path: Path) -> None:
    with scene(tmp_path, watch=True, reports=True) as at:
        study = at.study("first", 1)
        at.upload(study)
        pdf = reports.encapsulated(reports.PDF, study.uid, images.new_uid(), images.new_uid())
        pdf.PatientID, pdf.StudyDate, pdf.StudyTime = study.patient_id, f"{date.today():%Y%m%d}", "080000"
        at.pacs.upload([rejection.write(pdf, tmp_path / "report")])

        def types() -> list[str]:
            return sorted(at.entries(study).values())

        both = ["application/dicom", "application/pdf"]
        peers.wait_until(lambda: types() == both, SOON, "manifest and report", 0.2)
        (report,) = [uid for uid, mime_type in at.entries(study).items() if mime_type == "application/pdf"]
        assert document(at.node, report) == reports.PDF
        at.pacs.upload([rejection.write(reject(study, pdf.SOPInstanceUID), tmp_path / "note")])
        peers.wait_until(lambda: types() == ["application/dicom"], SOON, "the report withdrawn", 0.2)
        assert at.listed(study) == study.uids


def test_a_silent_pacs_does_not_hold_up_the_end(tmp_path: Path) -> None:
    with scene(tmp_path, watch=True) as at, peers.paused(at.pacs.daemon):
        time.sleep(3.0)  # a sweep asks, and nobody answers
        assert at.node.terminate(20.0) == 0


def test_publish_watch_as_a_command(tmp_path: Path) -> None:
    with scene(tmp_path) as at:
        study = at.study("first")
        at.upload(study)
        watching = subprocess.Popen(
            [*at.node.command, "publish", "--config", str(at.node.file), "--watch"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment(),
        )
        try:
            assert watching.stdout is not None
            outcome, uid, *_ = watching.stdout.readline().split()
            assert (outcome, uid) == ("registered", study.uid)
            assert at.listed(study) == study.uids
            at.pacs.delete(study.uid)
            assert watching.stdout.readline().split()[0] == "withdrawn"
            watching.terminate()
            assert watching.wait(30) == 0
        finally:
            watching.kill()
            watching.wait()
            assert watching.stdout is not None
            watching.stdout.close()
