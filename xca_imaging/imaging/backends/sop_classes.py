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
import ssl
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pydicom import config
from pydicom.dataset import Dataset
from pydicom.uid import UID
from pynetdicom import AE, build_context, build_role, evt
from pynetdicom.pdu import A_ASSOCIATE_AC
from pynetdicom.presentation import AllStoragePresentationContexts

from xca_imaging import settings, uids
from xca_imaging.errors import ConnectFailed, PeerError, PeerProtocolError, PeerRefused, PeerTimeout
from xca_imaging.imaging.attributes import Attributes

if TYPE_CHECKING:
    from pynetdicom.association import Association
    from pynetdicom.events import Event

_log = logging.getLogger(__name__)

STUDY_ROOT_GET = "1.2.840.10008.5.1.4.1.2.2.3"  # PS3.4 C.6.2

_PIXEL_DATA = 0x7FE00010  # (7FE0,0010): not kept
_CLASSES_PER_ASSOCIATION = 127  # PS3.8 9.3.2.2: context ids are the odd numbers to 255, one of them is for C-GET itself

# PS3.6 Table A-1: classes that archives still hold and pynetdicom no longer lists.
_RETIRED = (
    "1.2.840.10008.5.1.4.1.1.3",  # Ultrasound Multi-frame Image
    "1.2.840.10008.5.1.4.1.1.5",  # Nuclear Medicine Image
    "1.2.840.10008.5.1.4.1.1.6",  # Ultrasound Image
)

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


def learn_from_images(
    pacs: settings.Pacs,
    study_instance_uid: str,
    wanted: Mapping[str, Sequence[str]],
    *,
    calling_ae_title: str,
    tls: ssl.SSLContext | None = None,
    connect_timeout: float = 10.0,
    response_timeout: float = 60.0,
) -> Learnt:
    """Fetch instances by C-GET and return what they are; those that do not come stay out of the answer. Blocks.

    Parameters
    ----------
    wanted : mapping
        SOP Instance UIDs by Series Instance UID.
    connect_timeout, response_timeout : float
        For the association; between two messages of the PACS.

    Raises
    ------
    ConnectFailed, PeerRefused, PeerTimeout, PeerProtocolError
    """
    learnt = Learnt()
    for classes, syntaxes in _rounds():
        missing = {
            series: rest
            for series, instances in wanted.items()
            if (rest := [uid for uid in instances if uid not in learnt.sop_class_uids])
        }
        if not missing:
            break
        _Round(pacs, calling_ae_title, tls, connect_timeout, response_timeout, learnt).run(
            classes, syntaxes, study_instance_uid, missing, {uid: len(each) for uid, each in wanted.items()}
        )
    return learnt


def _rounds() -> Iterator[tuple[list[str], list[str]]]:
    """Classes and transfer syntaxes of one association after the other: all classes plain, then images compressed."""
    classes = [str(context.abstract_syntax) for context in AllStoragePresentationContexts]
    classes += [uid for uid in _RETIRED if uid not in classes]
    plain = [uids.EXPLICIT_VR_LITTLE_ENDIAN, uids.IMPLICIT_VR_LITTLE_ENDIAN]
    for start in range(0, len(classes), _CLASSES_PER_ASSOCIATION):
        yield classes[start : start + _CLASSES_PER_ASSOCIATION], plain
    images = [uid for uid in classes if "Image" in UID(uid).name][:_CLASSES_PER_ASSOCIATION]
    for syntax in _COMPRESSED:
        # Not one context with all of them: of each context the PACS takes one syntax, and sends nothing in the others.
        yield images, [syntax]


@dataclass(slots=True)
class _Round:
    """One association. Mutable state: `learnt`, written by pynetdicom's thread and read by ours after each C-GET, and
    `series`, that of the C-GET under way, the other way round."""

    pacs: settings.Pacs
    calling_ae_title: str
    tls: ssl.SSLContext | None
    connect_timeout: float
    response_timeout: float
    learnt: Learnt
    series: str = ""

    def run(
        self,
        classes: Sequence[str],
        syntaxes: list[str],
        study: str,
        missing: Mapping[str, Sequence[str]],
        sizes: Mapping[str, int],
    ) -> None:
        association = self._associate(classes, syntaxes)
        try:
            for series, instances in missing.items():
                if len(instances) == sizes[series]:
                    self._get(association, "SERIES", study, series)
                else:
                    for instance in instances:
                        self._get(association, "IMAGE", study, series, instance)
        finally:
            if association.is_established:
                association.release()
            association.join(self.connect_timeout)

    def _associate(self, classes: Sequence[str], syntaxes: list[str]) -> Association:
        entity = AE(ae_title=self.calling_ae_title)
        entity.implementation_class_uid = UID(uids.IMPLEMENTATION_CLASS_UID)
        entity.implementation_version_name = uids.IMPLEMENTATION_VERSION_NAME
        entity.connection_timeout = entity.acse_timeout = self.connect_timeout
        entity.dimse_timeout = self.response_timeout
        entity.network_timeout = None
        plain = [uids.EXPLICIT_VR_LITTLE_ENDIAN, uids.IMPLICIT_VR_LITTLE_ENDIAN]
        accepted: list[bool] = []  # pynetdicom aborts an association that was accepted without any of the contexts

        def on_pdu(event: Event) -> None:
            if isinstance(event.pdu, A_ASSOCIATE_AC):
                accepted.append(True)

        association = entity.associate(
            self.pacs.host,
            self.pacs.port,
            contexts=[build_context(STUDY_ROOT_GET, plain), *(build_context(uid, syntaxes) for uid in classes)],
            ae_title=self.pacs.ae_title,
            ext_neg=[build_role(uid, scp_role=True) for uid in classes],
            tls_args=(self.tls, self.pacs.host) if self.tls else None,
            evt_handlers=[(evt.EVT_C_STORE, self._stored), (evt.EVT_PDU_RECV, on_pdu)],
        )
        if not association.is_established and not accepted:
            raise ConnectFailed(self.pacs.name, "no association for C-GET, which is needed to learn SOP Classes")
        if STUDY_ROOT_GET not in {str(context.abstract_syntax) for context in association.accepted_contexts}:
            if association.is_established:
                association.release()
            raise PeerRefused(
                self.pacs.name,
                "tells no SOP Classes (0008,0016) in C-FIND, and does not do C-GET, by which they could be learnt",
            )
        return association

    def _get(self, association: Association, level: str, study: str, series: str, instance: str = "") -> None:
        """Fetch a series or an instance. A failure status is no error: what did not come is asked for elsewhere."""
        self.series = series
        identifier = Dataset()
        identifier.QueryRetrieveLevel = level
        identifier.StudyInstanceUID = UID(study, validation_mode=config.IGNORE)
        identifier.SeriesInstanceUID = UID(series, validation_mode=config.IGNORE)
        if instance:
            identifier.SOPInstanceUID = UID(instance, validation_mode=config.IGNORE)
        try:
            for status, _ in association.send_c_get(identifier, STUDY_ROOT_GET):
                if "Status" not in status:
                    raise self._ended(association, level)
                if status.Status not in (0x0000, 0xFF00):
                    _log.debug("%s: C-GET %s of %s: status 0x%04X", self.pacs.name, level, series, status.Status)
        except RuntimeError as exc:  # the association ended between two requests
            raise PeerProtocolError(self.pacs.name, "the association for C-GET was lost") from exc

    def _ended(self, association: Association, level: str) -> PeerError:
        if association.acse.is_aborted():
            return PeerProtocolError(self.pacs.name, f"C-GET {level}: association aborted")
        return PeerTimeout(self.pacs.name, f"C-GET {level}: nothing for {self.response_timeout:g} s")

    def _stored(self, event: Event) -> int:
        uid, sop_class = str(event.request.AffectedSOPInstanceUID), str(event.request.AffectedSOPClassUID)
        if uids.is_uid(uid) and uids.is_uid(sop_class):
            self.learnt.sop_class_uids[uid] = sop_class
            if self.series not in self.learnt.headers:
                dataset: Dataset = event.dataset
                dataset.pop(_PIXEL_DATA, None)
                self.learnt.headers[self.series] = Attributes(dataset)
        return 0x0000
