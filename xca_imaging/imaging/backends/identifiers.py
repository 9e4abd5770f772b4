"""Identifiers of queries and retrievals: small data sets to bytes and back.

References
----------
* DICOM PS3.4, C.4.2.1.4 (identifier of a retrieval), C.2.2.2 (keys); PS3.5, 7.1 (data element structure)
"""

from __future__ import annotations

from io import BytesIO

from pydicom import config
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filereader import read_dataset
from pydicom.filewriter import write_dataset
from pydicom.tag import Tag

from xca_imaging import uids
from xca_imaging.errors import LocalProtocolError
from xca_imaging.imaging.backends import MoveJob

_QUERY_RETRIEVE_LEVEL = Tag(0x0008, 0x0052)
_SOP_INSTANCE_UID = Tag(0x0008, 0x0018)
_STUDY_INSTANCE_UID = Tag(0x0020, 0x000D)
_SERIES_INSTANCE_UID = Tag(0x0020, 0x000E)


def encode(dataset: Dataset, transfer_syntax_uid: str) -> bytes:
    """Return a data set in Explicit or Implicit VR Little Endian."""
    stream = DicomBytesIO()
    stream.is_little_endian = True
    stream.is_implicit_VR = transfer_syntax_uid == uids.IMPLICIT_VR_LITTLE_ENDIAN
    write_dataset(stream, dataset)
    return stream.getvalue()


def decode(data: bytes, transfer_syntax_uid: str) -> Dataset:
    """Return the data set; pydicom raises whatever the bytes make it raise."""
    return read_dataset(BytesIO(data), transfer_syntax_uid == uids.IMPLICIT_VR_LITTLE_ENDIAN, True)


def of_job(job: MoveJob, *, uid_list_limit: int) -> Dataset:
    """Return the identifier of a retrieval, which never matches more than was asked.

    Raises
    ------
    LocalProtocolError
        A unique key of the level is missing, or there are more than `uid_list_limit` SOP Instance UIDs.
    """
    keys = [job.study_instance_uid]
    if job.level != "STUDY":
        keys.append(job.series_instance_uid)
    if job.level == "IMAGE":
        keys += job.sop_instance_uids or ("",)
    if not all(keys):
        raise LocalProtocolError(f"a retrieval at {job.level} level needs its unique keys (PS3.4 C.4.2.1.4)")
    if len(job.sop_instance_uids) > uid_list_limit:
        raise LocalProtocolError(f"more than {uid_list_limit} SOP Instance UIDs in one retrieval")
    identifier = Dataset()
    identifier.add(DataElement(_QUERY_RETRIEVE_LEVEL, "CS", job.level))

    def add(tag: int, uid: str | list[str]) -> None:
        # UIDs of others are passed on as they are, also where they break PS3.5 9.1.
        identifier.add(DataElement(tag, "UI", uid, validation_mode=config.IGNORE))

    add(_STUDY_INSTANCE_UID, job.study_instance_uid)
    if job.level != "STUDY":
        add(_SERIES_INSTANCE_UID, job.series_instance_uid)
    if job.level == "IMAGE":
        add(_SOP_INSTANCE_UID, list(job.sop_instance_uids))
    return identifier
