"""Every back end against real PACSs: what arrives is, byte for byte, what the same PACS puts on the wire elsewhere."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support import images, peers
from tests.support.collecting import Collector
from xca_imaging import settings, uids
from xca_imaging.imaging.backends import Backend, MoveJob, MoveResult, make_backends
from xca_imaging.imaging.backends.pool import Associations
from xca_imaging.imaging.decisions import Method
from xca_imaging.imaging.store_scp import StoreScp

pytestmark = [pytest.mark.peer, pytest.mark.timeout(120)]

KINDS = ["ct", "mr", "compressed", "structured_report"]
ANY = (
    uids.EXPLICIT_VR_LITTLE_ENDIAN,
    uids.IMPLICIT_VR_LITTLE_ENDIAN,
    "1.2.840.10008.1.2.4.50",
    "1.2.840.10008.1.2.4.80",
    "1.2.840.10008.1.2.4.90",
    "1.2.840.10008.1.2.4.91",
    "1.2.840.10008.1.2.5",
)


@dataclass
class Archive:
    """A PACS with studies, and what a bit-preserving receiver gets from it."""

    pacs: Any
    studies: dict[str, images.Study]
    reference: peers.StoreScp
    ours: peers.Entity

    def as_sent(self, study: images.Study) -> dict[str, bytes]:
        """Return the data sets by SOP Instance UID, as the PACS sends them."""
        found = self.reference.files()
        if not study.uids <= set(found):
            peers.movescu(self.pacs, self.reference.ae_title, study.uid)
            found = self.reference.files()
        return {uid: images.dataset_bytes(found[uid].read_bytes()) for uid in study.uids}


def archive(kind: str, folder: Path) -> Iterator[Archive]:
    ours = peers.Entity("XCAI", peers.free_port())
    makers: dict[str, Any] = {
        "orthanc": lambda *a: peers.Orthanc(*a, dicomweb=True),
        "dcmqrscp": peers.Dcmqrscp,
        "qrscp": peers.Qrscp,
    }
    with (
        peers.StoreScp(folder / "reference") as reference,
        makers[kind](folder / "pacs", [ours, reference.entity]) as pacs,
    ):
        # dcmqrscp takes no compressed objects unless it is told to, and then no others
        kinds = [each for each in KINDS if kind != "dcmqrscp" or each != "compressed"]
        studies = {each: getattr(images, each)(folder / each) for each in kinds}
        for study in studies.values():
            pacs.upload(study.paths)
        yield Archive(pacs, studies, reference, ours)


@pytest.fixture(scope="module")
def orthanc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Archive]:
    yield from archive("orthanc", tmp_path_factory.mktemp("orthanc"))


@pytest.fixture(scope="module")
def dcmqrscp(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Archive]:
    yield from archive("dcmqrscp", tmp_path_factory.mktemp("dcmqrscp"))


@pytest.fixture(scope="module")
def qrscp(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Archive]:
    yield from archive("qrscp", tmp_path_factory.mktemp("qrscp"))


@asynccontextmanager
async def backend(archive: Archive, method: Method, collector: Collector) -> AsyncIterator[Backend]:
    """Give a back end for the PACS, with a Storage SCP where it needs one."""
    pacs = settings.Pacs(
        name="peer",
        ae_title=archive.pacs.ae_title,
        host=archive.pacs.host,
        port=archive.pacs.port,
        retrieve_location_uid="1.2.3",
        retrieve=method,
        wado_rs=f"{archive.pacs.url}/dicom-web" if method == "wado-rs" else "",
    )
    ours = archive.ours
    scp = StoreScp(collector, ae_title=ours.ae_title, host=ours.host, port=ours.port)
    if method == "c-move":
        await scp.start()
    listener = (ours.host, ours.port)
    made = make_backends(
        Associations(pacs, calling_ae_title=ours.ae_title, listener=listener, receiver=collector),
        ae_title=ours.ae_title,
        listener=listener,
        receiver=collector,
        connect_timeout=5.0,
        stall_timeout=20.0,
    )
    assert list(made) == [method]
    try:
        yield made[method]
    finally:
        await made[method].close()
        await scp.close(5.0)


async def run(made: Backend, job: MoveJob) -> MoveResult:
    return await made.move(job, lambda _: None)


CASES: list[tuple[str, Method]] = [
    ("orthanc", "c-move"),
    ("orthanc", "c-get"),
    ("orthanc", "wado-rs"),
    ("dcmqrscp", "c-move"),
    ("dcmqrscp", "c-get"),
    ("qrscp", "c-move"),
    ("qrscp", "c-get"),
]


@pytest.mark.parametrize(
    ("peer", "method", "kind"),
    [(*case, kind) for case in CASES for kind in KINDS if (case[0], kind) != ("dcmqrscp", "compressed")],
)
async def test_a_study(request: pytest.FixtureRequest, peer: str, method: Method, kind: str) -> None:
    archive: Archive = request.getfixturevalue(peer)
    study = archive.studies[kind]
    collector = Collector(ANY)
    async with backend(archive, method, collector) as made:
        classes = {each.uid: each.sop_class for each in study.instances}
        result = await run(made, MoveJob("STUDY", study.uid, accept=ANY, sop_classes=classes))
    assert result.status == 0x0000, result
    if method == "wado-rs":  # Orthanc gives the files as they are, and encodes anew what it sends by C-STORE
        reference = {each.uid: each.dataset_bytes for each in study.instances}
    else:
        reference = archive.as_sent(study)
    assert set(collector.held) == set(reference)
    for uid, kept in collector.held.items():
        assert bytes(kept.data) == reference[uid], f"{uid} in {kept.request.transfer_syntax_uid}"
    for instance in study.instances:
        if instance.transfer_syntax not in ANY[:2]:  # dcmqrscp makes explicit VR of implicit VR
            assert collector.held[instance.uid].request.transfer_syntax_uid == instance.transfer_syntax
        assert collector.held[instance.uid].request.sop_class_uid == instance.sop_class


@pytest.mark.parametrize(("peer", "method"), CASES)
async def test_series_and_lists_of_instances(request: pytest.FixtureRequest, peer: str, method: Method) -> None:
    archive: Archive = request.getfixturevalue(peer)
    study = archive.studies["ct"]
    (series, instances) = next(iter(study.series.items()))
    listed = tuple(each.uid for each in instances[1:3])
    collector = Collector(ANY)
    async with backend(archive, method, collector) as made:
        await run(made, MoveJob("SERIES", study.uid, series, accept=ANY))
        assert set(collector.held) == {each.uid for each in instances}
        collector.stores.clear()
        if peer != "qrscp":  # which does not understand lists
            await run(made, MoveJob("IMAGE", study.uid, series, listed, accept=ANY))
            assert set(collector.held) == set(listed)
            collector.stores.clear()
        await run(made, MoveJob("IMAGE", study.uid, series, listed[:1], accept=ANY))
        assert set(collector.held) == set(listed[:1])
