"""The Imaging Document Consumer against gateways that leave out, mix up or break off."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import jsonschema
import pydicom
import pytest
from pydicom.data import get_testdata_file

from xca_imaging import errors, settings, uids
from xca_imaging.gateway.consumer import Consumer, Found, FoundManifest, Routes
from xca_imaging.gateway.peers import PartSink
from xca_imaging.gateway.receipt import TRANSCODED, ManifestFacts, Receipt, reason_of
from xca_imaging.imaging.manifest import InstanceReference, Manifest, SeriesReference, StudyReference
from xca_imaging.imaging.study import Patient
from xca_imaging.metadata.model import Code, DocumentEntry, Submission
from xca_imaging.transactions.adhoc_query import QueryResponse
from xca_imaging.transactions.document_set import DocumentResponse, RetrieveResponse
from xca_imaging.transactions.imaging_document_set import RetrieveImagingRequest
from xca_imaging.transactions.registry_response import RegistryResponse, response_to
from xca_imaging.wire.mtom import Reference

SCHEMA = jsonschema.Draft202012Validator(
    json.loads((Path(__file__).parents[2] / "docs" / "receipt.schema.json").read_text()),
    format_checker=jsonschema.FormatChecker(),
)
EAST = "urn:oid:1.2.9"
LOCATION = "1.2.9.3"
CONFIGURATION = f"""[node]
home_community_id = "urn:oid:1.2.3"
[[community]]
home_community_id = "{EAST}"
imaging = "http://127.0.0.1:9/rad75"
repositories = ["{LOCATION}"]
"""


def image(sop_instance_uid: str = "") -> bytes:
    path = get_testdata_file("CT_small.dcm", download=False)
    assert isinstance(path, str)
    content = Path(path).read_bytes()
    return content.replace(CT.SOPInstanceUID.encode(), sop_instance_uid.encode()) if sop_instance_uid else content


CT = pydicom.dcmread(str(get_testdata_file("CT_small.dcm", download=False)), stop_before_pixels=True)
FIRST = str(CT.SOPInstanceUID)
SECOND = FIRST[:-1] + ("1" if FIRST[-1] != "1" else "2")


class Gateway:
    """Answers each RAD-75 with the next of its scripts, and counts."""

    def __init__(self, *scripts: Callable[[Gateway], None]) -> None:
        self.scripts = list(scripts)
        self.asked: list[list[str]] = []

    async def retrieve_imaging(
        self,
        endpoint: object,
        request: RetrieveImagingRequest,
        sink_factory: Callable[[str, str], PartSink],
        on_response: Callable[[RetrieveResponse], None],
        *,
        cross_gateway: bool,
        message_id: str,
    ) -> None:
        assert cross_gateway
        self.asked.append([document.document_unique_id for _, _, document in request])
        self.sink_factory, self.on_response = sink_factory, on_response
        self.scripts.pop(0)(self)

    def answer(self, uids_named: Sequence[str], registry: RegistryResponse | None = None) -> None:
        documents = tuple(
            DocumentResponse(EAST, LOCATION, uid, uids.MIME_DICOM, Reference(f"{uid}@x")) for uid in uids_named
        )
        self.on_response(RetrieveResponse(registry or response_to(found=1), documents))

    def attach(self, uid: str, content: bytes, *, whole: bool = True) -> None:
        sink = self.sink_factory(f"{uid}@x", uids.MIME_DICOM)
        sink.write(memoryview(content))
        if whole:
            sink.finish()
        else:
            sink.abandon()


async def retrieve(tmp_path: Path, *scripts: Callable[[Gateway], None], accept: str = "") -> tuple[Receipt, Gateway]:
    file = tmp_path / "node.toml"
    file.write_text(CONFIGURATION)
    gateway = Gateway(*scripts)
    series = SeriesReference(
        series_instance_uid=str(CT.SeriesInstanceUID),
        retrieve_ae_title="PACS",
        retrieve_location_uid=LOCATION,
        instances=tuple(InstanceReference(str(CT.SOPClassUID), uid) for uid in (FIRST, SECOND)),
    )
    manifest = Manifest(
        sop_instance_uid="1.2.9.4",
        series_instance_uid="1.2.9.5",
        study_instance_uid=str(CT.StudyInstanceUID),
        patient=Patient(),
        title=Code("113030", "DCM"),
        studies=(StudyReference(str(CT.StudyInstanceUID), (series,)),),
    )
    consumer = Consumer(gateway, Routes(settings.load(file), lambda: ""))  # type: ignore[arg-type]
    receipt = await consumer.retrieve(
        [FoundManifest(manifest, ManifestFacts("1.2.9.4", "0" * 64, "", ""))],
        tmp_path / "out",
        accept=(accept or uids.EXPLICIT_VR_LITTLE_ENDIAN,),
    )
    assert not (tmp_path / "out" / ".incoming").exists()
    written = {path.stem for path in (tmp_path / "out").rglob("*.dcm")}
    assert written == {want.sop_instance_uid for want in receipt.ledger.outcome().held}
    validate(receipt)
    return receipt, gateway


def both(gateway: Gateway) -> None:
    gateway.answer([FIRST, SECOND])
    gateway.attach(FIRST, image())
    gateway.attach(SECOND, image(SECOND))


def reasons(receipt: Receipt) -> dict[str, str]:
    return {entry.want.sop_instance_uid: reason_of(entry) for entry in receipt.ledger if entry.error is not None}


def validate(receipt: Receipt) -> None:
    """What would be written is what the published schema says, and nothing that it does not know."""
    content = receipt.as_json()
    SCHEMA.validate(content)
    known = SCHEMA.schema["properties"]
    assert content.keys() <= known.keys()
    for entry in content["instances"]:
        assert entry.keys() <= SCHEMA.schema["$defs"]["instance"]["properties"].keys()


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA.schema)


GOOD = {
    "version": 1,
    "complete": True,
    "trace_id": "urn:uuid:1",
    "requested_at": "2026-01-01T00:00:00.000Z",
    "finished_at": "2026-01-01T00:00:01.000Z",
    "manifest": {
        "document_unique_id": "1.2",
        "sha256": "0" * 64,
        "home_community_id": "",
        "repository_unique_id": "1.2",
    },
    "instances": [
        {
            "study_instance_uid": "1.2.3",
            "series_instance_uid": "1.2.4",
            "sop_instance_uid": "1.2.5",
            "state": "held",
            "size": 1,
            "sha256": "0" * 64,
            "transfer_syntax_uid": "1.2.840.10008.1.2.1",
            "source": {"home_community_id": "", "repository_unique_id": "1.2"},
            "bytes_changed": False,
            "attempts": 1,
        }
    ],
    "unexpected": [],
}


@pytest.mark.parametrize(
    ("of_receipt", "of_instance"),
    [
        ({"complete": False}, {}),
        ({"instances": []}, {}),
        ({"finished_at": "yesterday"}, {}),
        ({"manifest": None}, {}),
        ({}, {"state": "failed", "reason": "gone"}),  # and complete
        ({"complete": False}, {"state": "failed"}),
        ({"complete": False}, {"state": "missing"}),
        ({}, {"sha256": ""}),
        ({}, {"size": 0}),
        ({}, {"reason": "why"}),
        ({}, {"sop_instance_uid": "x"}),
        ({}, {"attempts": 0}),
    ],
)
def test_the_schema_sees_a_receipt_that_lies(of_receipt: dict[str, object], of_instance: dict[str, object]) -> None:
    SCHEMA.validate(GOOD)
    SCHEMA.validate(GOOD | {"new in a later version": 1})
    (instance,) = GOOD["instances"]  # type: ignore[misc]
    with pytest.raises(jsonschema.ValidationError):
        SCHEMA.validate(GOOD | {"instances": [instance | of_instance]} | of_receipt)  # type: ignore[operator]


async def test_all_arrive(tmp_path: Path) -> None:
    receipt, gateway = await retrieve(tmp_path, both)
    assert receipt.complete
    assert gateway.asked == [[FIRST, SECOND]]
    receipt.write(tmp_path / "receipt.json")
    written = json.loads((tmp_path / "receipt.json").read_text())
    assert written["complete"] is True
    assert {entry["source"]["home_community_id"] for entry in written["instances"]} == {EAST}


async def test_attachments_before_the_root(tmp_path: Path) -> None:
    def script(gateway: Gateway) -> None:
        gateway.attach(FIRST, image())
        gateway.attach(SECOND, image(SECOND))
        gateway.answer([FIRST, SECOND])

    assert (await retrieve(tmp_path, script))[0].complete


async def test_success_with_one_missing_is_not_complete(tmp_path: Path) -> None:
    def script(gateway: Gateway) -> None:
        gateway.answer([FIRST])
        gateway.attach(FIRST, image())

    receipt, _ = await retrieve(tmp_path, script)
    assert not receipt.complete
    assert reasons(receipt) == {SECOND: "never arrived"}


@pytest.mark.parametrize("place", ["location", "context"])
async def test_an_error_is_read_wherever_it_names_the_instance(tmp_path: Path, place: str) -> None:
    location, context = (SECOND, "gone") if place == "location" else (EAST, f"{SECOND}: gone")

    def script(gateway: Gateway) -> None:
        gateway.answer([FIRST], response_to([errors.DocumentUniqueIdError(context, location)], found=1))
        gateway.attach(FIRST, image())

    receipt, _ = await retrieve(tmp_path, script)
    assert reasons(receipt) == {SECOND: f"XDSDocumentUniqueIdError: {context}"}


async def test_each_of_several_errors_goes_to_its_instance(tmp_path: Path) -> None:
    def script(gateway: Gateway) -> None:
        said = [errors.RepositoryBusy("later", FIRST), errors.DocumentUniqueIdError(f"{SECOND}: gone", EAST)]
        gateway.answer([], response_to(said))

    receipt, _ = await retrieve(tmp_path, script)
    assert reasons(receipt) == {
        FIRST: "XDSRepositoryBusy: later",
        SECOND: f"XDSDocumentUniqueIdError: {SECOND}: gone",
    }


async def test_an_answer_that_breaks_off_keeps_what_was_whole_and_asks_for_the_rest(tmp_path: Path) -> None:
    def breaks(gateway: Gateway) -> None:
        gateway.answer([FIRST, SECOND])
        gateway.attach(FIRST, image())
        gateway.attach(SECOND, image(SECOND)[:1000], whole=False)
        raise errors.PeerProtocolError("East", "the connection was cut")

    def rest(gateway: Gateway) -> None:
        gateway.answer([SECOND])
        gateway.attach(SECOND, image(SECOND))

    receipt, gateway = await retrieve(tmp_path, breaks, rest)
    assert receipt.complete
    assert gateway.asked == [[FIRST, SECOND], [SECOND]]
    assert [entry.attempts for entry in receipt.ledger] == [1, 2]


async def test_a_peer_that_is_not_there_is_asked_once(tmp_path: Path) -> None:
    def script(gateway: Gateway) -> None:
        raise errors.ConnectFailed("East", "refused")

    receipt, gateway = await retrieve(tmp_path, script)
    assert set(reasons(receipt).values()) == {"East: refused"}
    assert len(gateway.asked) == 1


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (image(), "another instance"),
        (image(SECOND)[:-10], "ends inside an element"),
        (b"<html>busy</html>", "not a readable"),
        (b"", "not a readable"),
    ],
)
async def test_what_is_not_the_instance_is_not_held(tmp_path: Path, content: bytes, reason: str) -> None:
    def script(gateway: Gateway) -> None:
        gateway.answer([FIRST, SECOND])
        gateway.attach(FIRST, image())
        gateway.attach(SECOND, content)

    receipt, _ = await retrieve(tmp_path, script)
    assert list(reasons(receipt)) == [SECOND]
    assert reason in reasons(receipt)[SECOND]


async def test_another_transfer_syntax_than_asked_is_not_held(tmp_path: Path) -> None:
    receipt, _ = await retrieve(tmp_path, both, accept="1.2.840.10008.1.2.4.70")
    assert all("was not asked for" in reason for reason in reasons(receipt).values())
    assert len(reasons(receipt)) == 2


async def test_what_nobody_asked_for_is_told_and_dropped(tmp_path: Path) -> None:
    def script(gateway: Gateway) -> None:
        gateway.answer([FIRST, SECOND, "1.2.99"])
        gateway.attach(FIRST, image())
        gateway.attach(SECOND, image(SECOND))
        gateway.attach("stray", image("1.2.99"))

    receipt, _ = await retrieve(tmp_path, script)
    assert receipt.complete
    assert receipt.unexpected == ["1.2.99", "attachment stray@x"]


@pytest.mark.parametrize("place", ["location", "context"])
async def test_a_source_that_transcoded_says_so(tmp_path: Path, place: str) -> None:
    location, context = (SECOND, TRANSCODED) if place == "location" else (EAST, f"{SECOND}: {TRANSCODED}")

    def script(gateway: Gateway) -> None:
        warning = errors.RepositoryError(context, location, warning=True)
        gateway.answer([FIRST, SECOND], response_to([warning], found=2))
        gateway.attach(FIRST, image())
        gateway.attach(SECOND, image(SECOND))

    receipt, _ = await retrieve(tmp_path, script)
    assert receipt.complete
    assert [entry.bytes_changed for entry in receipt.ledger] == [False, True]


async def test_a_disk_without_room_ends_in_the_receipt(tmp_path: Path) -> None:
    def script(gateway: Gateway) -> None:
        gateway.answer([FIRST, SECOND])
        gateway.attach(FIRST, image())
        # What a full disk does: the device that takes nothing.
        full = gateway.sink_factory(f"{SECOND}@x", uids.MIME_DICOM)
        full._file.close()  # type: ignore[attr-defined]
        full._file = open("/dev/full", "wb", buffering=0)  # type: ignore[attr-defined]  # noqa: SIM115
        try:
            full.write(memoryview(image(SECOND)))
        finally:
            full.abandon()

    receipt, gateway = await retrieve(tmp_path, script)
    assert list(reasons(receipt)) == [SECOND]
    assert "No space left" in reasons(receipt)[SECOND]
    assert len(gateway.asked) == 1


class Registry:
    """Answers a query with what it was made with."""

    def __init__(self, response: QueryResponse) -> None:
        self.response = response

    async def stored_query(self, endpoint: object, query: object, *, cross_gateway: bool) -> QueryResponse:
        return self.response


def entry() -> DocumentEntry:
    return DocumentEntry(entry_uuid="urn:uuid:1", unique_id="1.2", patient_id="1^^^&1.2&ISO")


async def find(tmp_path: Path, response: QueryResponse) -> Found:
    file = tmp_path / "node.toml"
    file.write_text(CONFIGURATION.replace("imaging =", "query ="))
    consumer = Consumer(Registry(response), Routes(settings.load(file), lambda: ""))  # type: ignore[arg-type]
    return await consumer.find_manifests("1^^^&1.2&ISO", EAST)


async def test_a_partial_query_is_not_taken_for_all(tmp_path: Path) -> None:
    warning = errors.RegistryError("slow today", warning=True)
    gone = errors.UnavailableCommunity("a branch is away")
    objects = Submission(documents=(entry(),))
    partial = QueryResponse(uids.STATUS_PARTIAL_SUCCESS, (warning, gone), objects)
    assert await find(tmp_path, partial) == Found((entry(),), (gone,))
    assert await find(tmp_path, QueryResponse(uids.STATUS_SUCCESS, (warning,), objects)) == Found((entry(),))
    odd = await find(tmp_path, QueryResponse("urn:x:Unheard", (), objects))
    assert odd.errors
    unread = errors.RegistryMetadataError("an entry without uniqueId")
    assert (await find(tmp_path, QueryResponse(uids.STATUS_SUCCESS, (), objects, (), (unread,)))).errors == (unread,)
    with pytest.raises(errors.SubmissionRefused, match="XDSUnavailableCommunity"):
        await find(tmp_path, QueryResponse(uids.STATUS_FAILURE, (gone,)))
