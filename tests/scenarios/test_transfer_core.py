"""The transfer core through a whole node: RAD-69 in, scripted PACSs behind, real sockets everywhere.

Each trap is a PACS of its own with a series of its own, so one node serves all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.pixels import pixel_array
from pydicom.uid import UID

from tests.imaging import test_transcode as transcoding
from tests.scenarios.holding import rad69
from tests.support import peers, soap_client
from tests.support.node import Node, pacs_section
from tests.support.scripted_pacs import Archive, ScriptedPacs
from xca_imaging.imaging.ledger import Want

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

EXPLICIT = soap_client.EXPLICIT_LE
DEADLINE = 60.0


@dataclass(frozen=True, slots=True)
class Trap:
    """What a PACS does, and what becomes of a series of five at it.

    `moves` are the C-MOVEs that it takes: (level, number of instances that are named).
    """

    scripts: tuple[str, ...]
    moves: tuple[tuple[str, int], ...]
    status: str = soap_client.SUCCESS
    told: str = ""
    options: tuple[tuple[str, Any], ...] = ()


WHOLE = ("SERIES", 0)
WHOLE_MOVE = ("SERIES", ())
TRAPS = {
    "store before the first response": Trap(("store_before_first_response",), (WHOLE,)),
    "store after the last response": Trap(("store_after_final",), (WHOLE,)),
    "the same instance twice": Trap(("same_uid_twice",), (WHOLE,)),
    "an instance nobody wants": Trap(("unwanted_uid",), (WHOLE,)),
    "no pending": Trap(("no_pending",), (WHOLE,)),
    "another calling AE title": Trap(("wrong_ae",), (WHOLE,)),
    "success with an instance missing": Trap(("success_with_missing", "good"), (WHOLE, ("IMAGE", 1))),
    "B000 without a list": Trap(("b000_without_list", "good"), (WHOLE, ("IMAGE", 1))),
    "abort inside an object": Trap(("abort_mid_object", "good"), (WHOLE, ("IMAGE", 1))),
    "closed between objects": Trap(("close_between_objects", "good"), (WHOLE, ("IMAGE", 3))),
    "abort of the move": Trap(("abort_move", "good"), (WHOLE, ("IMAGE", 4))),
    "busy at first": Trap(("good",), (WHOLE,), options=(("busy", 2),)),
    "out of resources at first": Trap(("a702", "good"), (WHOLE, WHOLE)),
    "endless pending": Trap(("endless_pending",), (WHOLE,), soap_client.FAILURE, "no wanted byte came for 5 s"),
    "destination unknown": Trap(("a801",), (WHOLE,), soap_client.FAILURE, "on the PACS, add the remote AE 'XCAI' with"),
}


@dataclass
class Traps:
    """A node, and a PACS with a series for each trap."""

    node: Node
    pacs: dict[str, ScriptedPacs]
    wants: dict[str, list[Want]]

    def ask(self, name: str, wants: Sequence[Want] = (), **more: Any) -> soap_client.Answer:
        return ask(self.node, wants or self.wants[name], location(list(self.pacs).index(name)), **more)


@dataclass(frozen=True, slots=True)
class _Asked:
    study: str
    series: str
    uid: str


def settle(pacs: ScriptedPacs) -> None:
    """Wait for a PACS to end its moves: an answer may be complete before the last C-STORE response has come home."""
    peers.wait_until(lambda: not pacs.active, DEADLINE, "the moves have ended")


def location(number: int) -> str:
    return f"1.3.6.1.4.1.21367.2017.3.{number + 1}"


def ask(
    node: Node, wants: Sequence[Want], repository: str, transfer_syntaxes: Sequence[str] = (EXPLICIT,)
) -> soap_client.Answer:
    asked = [_Asked(want.study_instance_uid, want.series_instance_uid, want.sop_instance_uid) for want in wants]
    return rad69(node, asked, repository=repository, transfer_syntaxes=transfer_syntaxes, deadline=DEADLINE)


def node_before(folder: Path, resources: ExitStack, pacs: dict[str, dict[str, Any]], **limits: Any) -> Any:
    """Start PACSs, by name with their options, and a node before them."""
    node = Node(folder / "node", {"limits": {"stall_timeout": "5s"}})
    running: dict[str, ScriptedPacs] = {}
    sections = []
    for number, (name, options) in enumerate(pacs.items()):
        more = options.pop("settings", {})
        scripts = options.pop("scripts", ())
        destination = (peers.LOOPBACK, node.dicom_port)
        one = ScriptedPacs(options.pop("archive"), destination, *scripts, ae_title=f"PACS{number}", **options)
        running[name] = resources.enter_context(one)
        sections.append(pacs_section(one.settings, name=f"pacs{number}", location=location(number), **more))
    node.config["pacs"] = sections
    resources.enter_context(node)
    return node, running


@pytest.fixture(scope="module")
def traps(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Traps]:
    with ExitStack() as resources:
        pacs: dict[str, dict[str, Any]] = {}
        wants = {}
        for name, trap in TRAPS.items():
            archive = Archive()
            wants[name] = archive.add_series(5)
            pacs[name] = {"archive": archive, "scripts": trap.scripts, **dict(trap.options)}
        node, running = node_before(tmp_path_factory.mktemp("traps"), resources, pacs)
        yield Traps(node, running, wants)


# --------------------------------------------------------------------------------------------------------------------
# Traps
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRAPS)
def test_trap(traps: Traps, name: str) -> None:
    trap, pacs, wants = TRAPS[name], traps.pacs[name], traps.wants[name]
    answer = traps.ask(name)
    settle(pacs)
    assert answer.registry_status == trap.status, answer.errors
    uids = {want.sop_instance_uid for want in wants}
    if trap.status == soap_client.SUCCESS:
        assert set(answer.documents) == uids
        for uid, document in answer.documents.items():
            assert pydicom.dcmread(BytesIO(document.content)).SOPInstanceUID == uid
        stored = [uid for uid, status in pacs.sent if status == 0 and uid in uids]
        assert set(stored) == uids
        assert len(stored) == (10 if name == "the same instance twice" else 5), "asked again for what was there"
    else:
        assert {error.location for error in answer.errors} == uids
        assert all(trap.told in error.context for error in answer.errors), answer.errors
    assert [(level, len(listed)) for level, listed in pacs.moves] == list(trap.moves)


def test_what_nobody_wants_is_refused_and_what_comes_twice_taken(traps: Traps) -> None:
    """Runs after its traps were asked; asks again otherwise."""
    for name, statuses in (("an instance nobody wants", {0x0124, 0}), ("the same instance twice", {0})):
        traps.ask(name)
        assert {status for _, status in traps.pacs[name].sent} == statuses


# --------------------------------------------------------------------------------------------------------------------
# Budgets
# --------------------------------------------------------------------------------------------------------------------


def test_never_a_fifth_association(tmp_path: Path) -> None:
    """400 objects in four series at a PACS of 20 ms an object and four associations of whatever kind."""
    archive = Archive()
    wants = [want for _ in range(4) for want in archive.add_series(100, study="1.2.3")]
    with ExitStack() as resources:
        node, running = node_before(
            tmp_path, resources, {"pacs": {"archive": archive, "latency": 0.02, "limit": 4, "scripts": ["no_pending"]}}
        )
        pacs = running["pacs"]
        answer = ask(node, wants, location(0))
        assert answer.registry_status == soap_client.SUCCESS, answer.errors
        settle(pacs)
        assert pacs.rejected == 0
        assert pacs.most_associations <= 4
        assert pacs.most_storing == 4
        assert pacs.moves == [WHOLE_MOVE] * 4
        assert len(pacs.sent) == 400


def test_a_hundred_identical_requests_fetch_each_instance_once(tmp_path: Path) -> None:
    archive = Archive()
    wants = archive.add_series(10)
    with ExitStack() as resources:
        node, running = node_before(tmp_path, resources, {"pacs": {"archive": archive, "latency": 0.02}})
        with ThreadPoolExecutor(100) as clients:
            answers = list(clients.map(lambda _: ask(node, wants, location(0)), range(100)))
        assert {answer.registry_status for answer in answers} == {soap_client.SUCCESS}
        settle(running["pacs"])
        expected = {want.sop_instance_uid for want in wants}
        assert all(set(answer.documents) == expected for answer in answers)
        assert len(running["pacs"].sent) == 10
        assert running["pacs"].moves == [WHOLE_MOVE]


def test_a_hundred_different_requests_at_a_pacs_of_four(tmp_path: Path) -> None:
    archive = Archive()
    requests = [archive.add_series(2) for _ in range(100)]
    with ExitStack() as resources:
        node, running = node_before(
            tmp_path, resources, {"pacs": {"archive": archive, "latency": 0.005, "limit": 4, "scripts": ["no_pending"]}}
        )
        pacs = running["pacs"]
        with ThreadPoolExecutor(100) as clients:
            answers = list(clients.map(lambda wants: ask(node, wants, location(0)), requests))
        assert {answer.registry_status for answer in answers} == {soap_client.SUCCESS}
        for wants, answer in zip(requests, answers, strict=True):
            assert set(answer.documents) == {want.sop_instance_uid for want in wants}
        settle(pacs)
        assert pacs.rejected == 0
        assert pacs.most_associations <= 4
        assert len(pacs.sent) == 200


def test_a_pacs_that_takes_one_move_on_an_association(tmp_path: Path) -> None:
    archive = Archive()
    requests = [archive.add_series(2) for _ in range(4)]
    with ExitStack() as resources:
        node, running = node_before(
            tmp_path,
            resources,
            {"pacs": {"archive": archive, "one_move_each": True, "settings": {"max_associations": 1}}},
        )
        for wants in requests:
            answer = ask(node, wants, location(0))
            assert answer.registry_status == soap_client.SUCCESS, answer.errors
            settle(running["pacs"])
        assert running["pacs"].moves == [WHOLE_MOVE] * 4
        assert len(running["pacs"].sent) == 8


def test_every_seventh_is_dropped_and_only_those_are_asked_again(tmp_path: Path) -> None:
    archive = Archive()
    wants = archive.add_series(40)
    with ExitStack() as resources:
        node, running = node_before(
            tmp_path,
            resources,
            {
                "pacs": {
                    "archive": archive,
                    "scripts": ["drops_every_7th", "good"],
                    "settings": {"level": "series"},  # else it would be split, and the script is for one move
                }
            },
        )
        answer = ask(node, wants, location(0))
        assert answer.registry_status == soap_client.SUCCESS, answer.errors
        assert set(answer.documents) == {want.sop_instance_uid for want in wants}
        settle(running["pacs"])
        (first, _), *again = running["pacs"].moves
        assert (first, {level for level, _ in again}) == ("SERIES", {"IMAGE"})
        assert sorted(uid for _, listed in again for uid in listed) == sorted(w.sop_instance_uid for w in wants[6::7])
        assert len(running["pacs"].sent) == 40


# --------------------------------------------------------------------------------------------------------------------
# Restarts
# --------------------------------------------------------------------------------------------------------------------


def test_a_node_killed_in_mid_transfer_does_not_fetch_again_what_it_held(tmp_path: Path) -> None:
    archive = Archive()
    wants = archive.add_series(12)
    with ExitStack() as resources:
        node, running = node_before(tmp_path, resources, {"pacs": {"archive": archive, "latency": 0.1}})
        pacs = running["pacs"]
        with ThreadPoolExecutor(1) as client:
            broken = client.submit(ask, node, wants, location(0))
            peers.wait_until(lambda: len(pacs.sent) >= 6, DEADLINE, "half of the series is sent", pause=0.005)
            node.process.kill()
            node.process.wait()
            assert broken.exception(DEADLINE) is not None, "an answer came from a node that was killed"
        settle(pacs)
        before = [uid for uid, status in pacs.sent if status == 0]
        node.start()
        answer = ask(node, wants, location(0))
        settle(pacs)
        assert answer.registry_status == soap_client.SUCCESS, answer.errors
        for uid, document in answer.documents.items():
            assert pydicom.dcmread(BytesIO(document.content)) == archive_of(archive, uid)
        again = [uid for uid, _ in pacs.sent[len(before) :]]
        # The last one may have been answered, and its place not yet been noted.
        assert set(again) & set(before[:-1]) == set()
        assert len(again) <= 13 - len(before)


def archive_of(archive: Archive, uid: str) -> pydicom.Dataset:
    return next(series[uid] for series in archive.series.values() if uid in series)


# --------------------------------------------------------------------------------------------------------------------
# Transcoding
# --------------------------------------------------------------------------------------------------------------------


def test_what_fits_no_listed_syntax_is_transcoded_losslessly(tmp_path: Path) -> None:
    """One series of an image as it is, a JPEG 2000 lossless one and one with loss: two come, one is named."""
    archive = Archive()
    originals = [transcoding.image(bits=(8, 8), seed=seed) for seed in range(3)]
    reversible = transcoding.jpeg_2000(originals[1], photometric_interpretation=2)
    lossy = transcoding.jpeg_2000(originals[2], photometric_interpretation=2, compression_ratios=[5])
    stored = [
        originals[0],
        transcoding.packed(originals[1], [reversible], transcoding.JPEG_2000_LOSSLESS),
        transcoding.packed(originals[2], [lossy], transcoding.JPEG_2000),
    ]
    wants = []
    for dataset in stored:
        place = (str(dataset.StudyInstanceUID), str(dataset.SeriesInstanceUID))
        archive.series[place] = {UID(dataset.SOPInstanceUID): dataset}
        wants.append(Want(*place, str(dataset.SOPInstanceUID), ""))
    with ExitStack() as resources:
        node, running = node_before(
            tmp_path,
            resources,
            {"pacs": {"archive": archive, "scripts": ["no_pending"], "settings": {"transcode": True}}},
        )
        for _ in range(2):
            answer = ask(node, wants, location(0))
            assert answer.registry_status == soap_client.PARTIAL
            error, note = sorted(answer.errors, key=lambda each: each.severity)
            assert (note.location, note.severity.rpartition(":")[2]) == (wants[1].sop_instance_uid, "Warning")
            assert (error.location, error.code) == (wants[2].sop_instance_uid, "XDSRepositoryError")
            assert "irreversible" in error.context
            for original in originals[:2]:
                read = pydicom.dcmread(BytesIO(answer.documents[str(original.SOPInstanceUID)].content))
                assert read.file_meta.TransferSyntaxUID == EXPLICIT
                assert np.array_equal(pixel_array(read), pixel_array(original))
        moves = len(running["pacs"].moves)
        # As it is stored, where that is listed; from what is held already.
        listed = [EXPLICIT, transcoding.JPEG_2000_LOSSLESS, transcoding.JPEG_2000]
        answer = ask(node, wants, location(0), listed)
        assert answer.registry_status == soap_client.SUCCESS
        syntaxes = [
            str(pydicom.dcmread(BytesIO(answer.documents[want.sop_instance_uid].content)).file_meta.TransferSyntaxUID)
            for want in wants
        ]
        assert syntaxes == listed
        assert len(running["pacs"].moves) == moves
