"""Memory does not grow with the study, nor with the instance: the node answers from files, not from memory."""

from __future__ import annotations

import shutil
import socket
import struct
from pathlib import Path

import pydicom
import pytest
from pydicom.uid import ExplicitVRLittleEndian, MultiFrameGrayscaleWordSecondaryCaptureImageStorage

from tests.scenarios.holding import check_same_dataset, rad69
from tests.scenarios.scripted import rad69_request_of
from tests.support import images, peers, soap_client
from tests.support.node import Node, Peak, pacs_section
from tests.support.scripted_pacs import SUCCESS, Archive, Move, ScriptedPacs, Scripts

pytestmark = [pytest.mark.peer, pytest.mark.slow, pytest.mark.timeout(600)]

CEILING = 100 * 2**20  # above idle
DIFFERENCE = 64 * 2**20  # between a small and a large study
SLICE = 512 * 1024
SMALL, LARGE = 400, 4000  # slices: 200 MB and 2 GB
INSTANCE = 2 * 10**9  # bytes of pixels


@pytest.mark.parametrize("count", [600])
def test_rad69_of_a_large_study(tmp_path: Path, count: int) -> None:
    """600 slices of 512 KiB: 300 MB through the spool; `make bench` has 2 GB."""
    study = images.big_ct(tmp_path / "study", count, series_count=4)
    node = Node(tmp_path / "node")
    with peers.Dcmqrscp(tmp_path / "pacs", [node.entity]) as pacs:
        pacs.upload(study.paths)
        node.config["pacs"] = [pacs_section(pacs, assigning_authority=images.AUTHORITY)]
        with node:
            small = rad69(node, study.instances[:1])
            assert small.registry_status == soap_client.SUCCESS
            idle = node.rss()
            with Peak(node) as peak:
                answer = rad69(node, study.instances, deadline=200)
            assert answer.registry_status == soap_client.SUCCESS, answer.errors[:3]
            documents = answer.documents
            assert set(documents) == study.uids
            check_same_dataset(documents[study.instances[-1].uid].content, study.instances[-1].path.read_bytes())
            growth = (peak.value - idle) / 2**20
            print(f"idle {idle / 2**20:.0f} MiB, peak {peak.value / 2**20:.0f} MiB, growth {growth:.0f} MiB")
            assert peak.value - idle <= CEILING, f"{growth:.0f} MiB above idle"


class Files(Scripts):
    """Sends files as they lie on the disk, by DCMTK's `storescu`: whatever their size, nobody has them in memory."""

    def __init__(self, study: images.Study) -> None:
        super().__init__()
        self._paths = {instance.uid: instance.path for instance in study.instances}

    def good(self, move: Move) -> None:
        files = [self._paths[str(dataset.SOPInstanceUID)] for dataset in move.matches]
        destination = peers.Entity(move.destination, move.pacs.destination[1])
        peers.storescu(destination, files, "-R", "-aet", move.pacs.ae_title)
        move.finish([SUCCESS] * len(files))


def archive_of(study: images.Study) -> Archive:
    """Return what C-FIND tells of a study."""
    archive = Archive()
    for instance in study.instances:
        dataset = pydicom.Dataset()
        dataset.SOPClassUID, dataset.SOPInstanceUID = instance.sop_class, instance.uid
        dataset.StudyInstanceUID, dataset.SeriesInstanceUID = instance.study, instance.series
        archive.series.setdefault((instance.study, instance.series), {})[instance.uid] = dataset
    return archive


def peak_of(folder: Path, study: images.Study, delivery: str) -> int:
    """Return the peak memory of a fresh node that serves a study once."""
    node = Node(folder / "node", {"http": {"delivery": delivery}})
    with ScriptedPacs(archive_of(study), (peers.LOOPBACK, node.dicom_port)) as pacs:
        pacs.behaviour = Files(study)
        size = sum(path.stat().st_size for path in study.paths)
        node.config["pacs"] = [pacs_section(pacs.settings)]
        with node, Peak(node) as peak:
            assert received(node, study) > size
    shutil.rmtree(folder)
    return peak.value


def received(node: Node, study: images.Study) -> int:
    """Ask for a study, keep nothing of it, and return how many bytes came."""
    with socket.create_connection((peers.LOOPBACK, node.http_port), timeout=300) as connection:
        connection.sendall(rad69_request_of(node, study.instances))
        head, end, total = b"", b"", 0
        while data := connection.recv(1 << 20):
            if len(head) < 100_000:
                head += data
            end = (end + data)[-100:]
            total += len(data)
    assert soap_client.SUCCESS.encode() in head
    assert b"--\r\n" in end  # the closing boundary
    return total


@pytest.mark.parametrize("delivery", ["spooled", "streaming"])
def test_the_size_of_the_study_does_not_matter(tmp_path: Path, delivery: str) -> None:
    if shutil.disk_usage(tmp_path).free < 4 * LARGE * SLICE:
        pytest.skip("not enough room on the disk")
    peaks = []
    for count in (SMALL, LARGE):
        study = images.big_ct(tmp_path / "study", count, series_count=4)
        peaks.append(peak_of(tmp_path / "run", study, delivery))
        shutil.rmtree(tmp_path / "study")
    print(f"{delivery}: peak {peaks[0] / 2**20:.0f} MiB and {peaks[1] / 2**20:.0f} MiB")
    assert peaks[1] - peaks[0] < DIFFERENCE


def multi_frame(folder: Path, size: int) -> images.Study:
    """Return a study of one multi-frame image with so many bytes of pixels: zeros, in a sparse file."""
    dataset = pydicom.dcmread(images.pydicom_file("CT_small.dcm"))
    dataset.SOPClassUID = MultiFrameGrayscaleWordSecondaryCaptureImageStorage
    dataset.Rows = dataset.Columns = 1000
    dataset.NumberOfFrames = size // 2_000_000
    dataset.PixelData = b"\0\0"
    if "DataSetTrailingPadding" in dataset:
        del dataset.DataSetTrailingPadding
    study = images.Study(images.new_uid(), images.new_patient())
    series, uid = images.new_uid(), images.new_uid()
    instance = images.write(
        folder, dataset, patient_id=study.patient_id, study=study.uid, series=series, uid=uid, number=1
    )
    with instance.path.open("r+b") as file:
        file.seek(-6, 2)  # the length of Pixel Data, and its two bytes
        start = file.tell() + 4
        file.write(struct.pack("<L", size))
        file.truncate(start + size)
    study.instances.append(
        images.Instance(
            instance.path,
            study.patient_id,
            study.uid,
            series,
            uid,
            str(dataset.SOPClassUID),
            str(ExplicitVRLittleEndian),
        )
    )
    return study


@pytest.mark.parametrize("delivery", ["spooled", "streaming"])
def test_the_size_of_the_instance_does_not_matter(tmp_path: Path, delivery: str) -> None:
    if shutil.disk_usage(tmp_path).free < 4 * INSTANCE:
        pytest.skip("not enough room on the disk")
    peaks = []
    for size in (INSTANCE // 100, INSTANCE):
        study = multi_frame(tmp_path / "study", size)
        peaks.append(peak_of(tmp_path / "run", study, delivery))
        shutil.rmtree(tmp_path / "study")
    print(f"{delivery}: peak {peaks[0] / 2**20:.0f} MiB and {peaks[1] / 2**20:.0f} MiB")
    assert peaks[1] - peaks[0] < DIFFERENCE
