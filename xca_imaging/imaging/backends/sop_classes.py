"""SOP Classes of instances whose PACS does not tell them: learnt by fetching the images.

SOP Class UID is an optional key of image queries, and a manifest cannot do without it. pynetdicom's `qrscp`, for one,
leaves it out. The images are fetched by C-GET on associations of our own, so nothing has to be configured on the PACS;
they are looked at and dropped.

References
----------
* DICOM PS3.4, C.4.3 (C-GET operation), C.5.3 (its association: one context for each class and syntax, roles reversed)
* DICOM PS3.4, Table C.6-5 (keys of the image level); PS3.7, D.3.3.4 (SCP/SCU role selection)
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from typing import TYPE_CHECKING

from pydicom.dataset import Dataset
from pydicom.filereader import read_dataset
from pydicom.tag import BaseTag
from pydicom.uid import UID

from xca_imaging import uids
from xca_imaging.errors import PeerProtocolError, PeerRefused, PeerTimeout
from xca_imaging.imaging.attributes import Attributes
from xca_imaging.imaging.backends import MoveJob, identifiers
from xca_imaging.imaging.backends.cget import STUDY_ROOT_GET
from xca_imaging.imaging.backends.requester import PENDING, Association, AssociationLost, ContextsRefused, Proposal
from xca_imaging.imaging.backends.storage_contexts import ALL_CLASSES
from xca_imaging.imaging.receiver import PeerAssociation, StoreRequest
from xca_imaging.wire import dimse

if TYPE_CHECKING:
    from xca_imaging.imaging.backends.pool import Associations

_log = logging.getLogger(__name__)

_PIXEL_DATA = 0x7FE00010  # (7FE0,0010): what stands before it is the header
_HEADER = 1024 * 1024  # bytes of an image that are looked at: headers of enhanced multi-frame objects reach some 100 KB
_CLASSES_PER_ASSOCIATION = 127  # PS3.8 9.3.2.2: context ids are the odd numbers to 255, one of them is for C-GET itself
_PLAIN = (uids.EXPLICIT_VR_LITTLE_ENDIAN, uids.IMPLICIT_VR_LITTLE_ENDIAN)

# What an archive may hold compressed and not decode for us, most usual first; one is tried after the other, only as
# long as instances are missing.
_COMPRESSED = (
    "1.2.840.10008.1.2.4.70",  # JPEG lossless, first-order prediction
    "1.2.840.10008.1.2.4.90",  # JPEG 2000 lossless
    "1.2.840.10008.1.2.4.50",  # JPEG baseline
    "1.2.840.10008.1.2.4.91",  # JPEG 2000
    "1.2.840.10008.1.2.4.80",  # JPEG-LS lossless
    "1.2.840.10008.1.2.4.81",  # JPEG-LS near-lossless
    "1.2.840.10008.1.2.5",  # RLE
    "1.2.840.10008.1.2.4.57",  # JPEG lossless
    "1.2.840.10008.1.2.4.51",  # JPEG extended
    "1.2.840.10008.1.2.4.201",  # HTJ2K lossless
    "1.2.840.10008.1.2.4.202",  # HTJ2K lossless, RPCL
    "1.2.840.10008.1.2.4.203",  # HTJ2K
    "1.2.840.10008.1.2.4.102",  # MPEG-4 AVC
    "1.2.840.10008.1.2.4.103",  # MPEG-4 AVC, BD-compatible
    "1.2.840.10008.1.2.4.100",  # MPEG-2 main level
    "1.2.840.10008.1.2.1.99",  # deflated
    "1.2.840.10008.1.2.2",  # explicit VR big endian
)


@dataclass(slots=True)
class Learnt:
    """What the fetched images said. `headers` holds the dataset of one image of each series."""

    sop_class_uids: dict[str, str] = field(default_factory=dict)
    headers: dict[str, Attributes] = field(default_factory=dict)


async def learn_from_images(
    associations: Associations,
    study_instance_uid: str,
    wanted: Mapping[str, Sequence[str]],
    *,
    response_timeout: float = 60.0,
) -> Learnt:
    """Fetch instances by C-GET and return what they are; those that do not come stay out of the answer.

    Parameters
    ----------
    wanted : mapping
        SOP Instance UIDs by Series Instance UID.
    response_timeout : float
        Between two messages of the PACS.

    Raises
    ------
    ConnectFailed, PeerBusy, PeerRefused, PeerTimeout, PeerProtocolError
    """
    learnt = Learnt()
    sizes = {series: len(each) for series, each in wanted.items()}
    for classes, syntaxes in _rounds():
        missing = {
            series: rest
            for series, instances in wanted.items()
            if (rest := [uid for uid in instances if uid not in learnt.sop_class_uids])
        }
        if not missing:
            break
        looker = _Looker(learnt)
        proposals = [Proposal(STUDY_ROOT_GET), *(Proposal(uid, syntaxes, receives=True) for uid in classes)]
        try:
            async with associations.lease(proposals, receiver=looker) as association:
                for series, instances in missing.items():
                    looker.series = series
                    if len(instances) == sizes[series]:
                        jobs = [MoveJob("SERIES", study_instance_uid, series)]
                    else:
                        jobs = [MoveJob("IMAGE", study_instance_uid, series, (uid,)) for uid in instances]
                    for job in jobs:
                        await _get(association, job, looker, response_timeout)
        except ContextsRefused as exc:
            text = "tells no SOP Classes (0008,0016) in C-FIND, and does not do C-GET, by which they could be learnt"
            raise PeerRefused(associations.pacs.name, text) from exc
    return learnt


def _rounds() -> Iterator[tuple[Sequence[str], tuple[str, ...]]]:
    """Classes and transfer syntaxes of one association after the other: all classes plain, then images compressed."""
    for start in range(0, len(ALL_CLASSES), _CLASSES_PER_ASSOCIATION):
        yield ALL_CLASSES[start : start + _CLASSES_PER_ASSOCIATION], _PLAIN
    images = [uid for uid in ALL_CLASSES if "Image" in UID(uid).name][:_CLASSES_PER_ASSOCIATION]
    for syntax in _COMPRESSED:
        # Not one context with all of them: of each context the PACS takes one syntax, and sends nothing in the others.
        yield images, (syntax,)


async def _get(association: Association, job: MoveJob, looker: _Looker, response_timeout: float) -> None:
    """Fetch a series or an instance. A failure status is no error: what did not come is asked for elsewhere."""
    pacs = association.pacs.name
    context = association.context_of(STUDY_ROOT_GET)
    identifier = identifiers.of_job(job, uid_list_limit=1)
    try:
        association.request(context, dimse.C_GET_RQ, identifiers.encode(identifier, context.transfer_syntax))
        while True:
            seen = looker.count
            try:
                answer = await association.answer(response_timeout)
            except PeerTimeout as exc:
                if looker.count > seen:  # it sends instances, and no interim responses
                    continue
                raise PeerTimeout(pacs, f"C-GET {job.level}: nothing for {response_timeout:g} s") from exc
            status = answer.response.status
            if status not in PENDING:
                break
    except AssociationLost as exc:
        raise PeerProtocolError(pacs, f"C-GET {job.level}: {exc}") from exc
    if status != dimse.STATUS_SUCCESS:
        _log.debug("%s: C-GET %s: status 0x%04X", pacs, job.level, status)


class _Looker:
    """A Receiver that looks at instances and drops them.

    Attributes
    ----------
    series : str
        That of the C-GET under way.
    count : int
        Instances that have begun to come.
    """

    def __init__(self, learnt: Learnt) -> None:
        self.learnt = learnt
        self.series = ""
        self.count = 0

    def begin(self, request: StoreRequest) -> _Look:
        self.count += 1
        return _Look(self, request, wants_header=self.series not in self.learnt.headers)

    def accepted_syntaxes(self, association: PeerAssociation) -> None:
        return None

    def offer(self, request: StoreRequest) -> int:
        return dimse.STATUS_REFUSED_NOT_AUTHORIZED

    def create_instance(
        self, association: PeerAssociation, sop_class: str, sop_instance: str, dataset: bytes, transfer_syntax: str
    ) -> int:
        return dimse.STATUS_REFUSED_NOT_AUTHORIZED

    def syntaxes_refused(self, association: PeerAssociation, refused: Mapping[str, tuple[str, ...]]) -> None:
        pass

    def association_closed(self, association: PeerAssociation, reason: str) -> None:
        pass


class _Look:
    """One instance that is looked at."""

    def __init__(self, looker: _Looker, request: StoreRequest, *, wants_header: bool) -> None:
        self._looker, self._request, self._wants_header = looker, request, wants_header
        self._head = bytearray()

    def write(self, *data: memoryview) -> None:
        for piece in data:
            if self._wants_header and len(self._head) < _HEADER:
                self._head += piece

    def commit(self) -> int:
        learnt, request = self._looker.learnt, self._request
        learnt.sop_class_uids[request.sop_instance_uid] = request.sop_class_uid
        if self._wants_header:
            learnt.headers[self._looker.series] = Attributes(_header(bytes(self._head), request.transfer_syntax_uid))
        return dimse.STATUS_SUCCESS

    def conclude(self) -> None:
        self._head.clear()

    def discard(self, reason: str) -> None:
        self._head.clear()


def _header(data: bytes, transfer_syntax_uid: str) -> Dataset:
    """Return the elements before the pixels, as far as they can be read."""

    def is_pixels(tag: BaseTag, vr: str | None, length: int) -> bool:
        return int(tag) >= _PIXEL_DATA

    syntax = UID(transfer_syntax_uid)
    if syntax.is_deflated:
        return Dataset()
    try:
        return read_dataset(BytesIO(data), syntax.is_implicit_VR, syntax.is_little_endian, stop_when=is_pixels)
    except Exception as exc:  # pydicom raises what it likes for bytes of others, and for those cut off
        _log.info("the header of an image cannot be read: %s", exc)
        return Dataset()
