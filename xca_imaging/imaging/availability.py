"""Instance Availability Notification: what an archive says of instances that have come, moved or gone.

A notification is a hint where to look, never the truth about a study: a peer may be wrong, late, or somebody else.

References
----------
* DICOM PS3.4, R.3 (Instance Availability Notification SOP Class), Table R.3.2-1 (N-CREATE attributes)
* DICOM PS3.7, C.5 (status of N-CREATE); PS3.3, C.4.23 (Instance Availability Notification module)
"""

from __future__ import annotations

import enum
import io
from collections.abc import Iterator
from dataclasses import dataclass

from pydicom.filereader import read_dataset
from pydicom.uid import UID

from xca_imaging.errors import NotificationError
from xca_imaging.imaging.attributes import Attributes
from xca_imaging.uids import is_uid

SOP_CLASS_UID = "1.2.840.10008.5.1.4.33"  # PS3.6 Table A-1

MAX_ITEMS = 8_000
"""Sequence items: more than a notification of 1 MB has when each names an instance. Each costs 20 us on the event
loop and 2 kB, so a data set of nothing but empty items would cost 2 s and 250 MB."""

# PS3.7 C.5: status of N-CREATE
_MISSING_ATTRIBUTE = 0x0120
_MISSING_VALUE = 0x0121
_INVALID_VALUE = 0x0106
_PROCESSING_FAILURE = 0x0110
_RESOURCE_LIMITATION = 0x0213

_ITEM_TAGS = (b"\xfe\xff\x00\xe0", b"\xff\xfe\xe0\x00")  # PS3.5 7.5.1 (FFFE,E000), little and big endian


class Availability(enum.Enum):
    """Instance Availability (0008,0056); PS3.3 C.4.23.1.1."""

    ONLINE = "ONLINE"
    NEARLINE = "NEARLINE"
    OFFLINE = "OFFLINE"
    UNAVAILABLE = "UNAVAILABLE"


@dataclass(frozen=True, slots=True)
class NotifiedInstance:
    """An item of the Referenced SOP Sequence: an instance, and how and from whom it is to be had."""

    series_instance_uid: str
    sop_class_uid: str
    sop_instance_uid: str
    availability: Availability
    retrieve_ae_title: str


@dataclass(frozen=True, slots=True)
class Notification:
    """What a peer says of instances of one study."""

    study_instance_uid: str
    performed_procedure_steps: tuple[str, ...]
    """SOP Instance UIDs of the Referenced Performed Procedure Step Sequence (0008,1111)."""
    instances: tuple[NotifiedInstance, ...]

    @property
    def retrieve_ae_titles(self) -> frozenset[str]:
        """The AE titles that the instances are, or were, to be had from."""
        return frozenset(instance.retrieve_ae_title for instance in self.instances)


def read_notification(dataset: bytes, transfer_syntax_uid: str, *, max_items: int = MAX_ITEMS) -> Notification:
    """Read the data set of an N-CREATE-RQ.

    Parameters
    ----------
    dataset : bytes
        In the transfer syntax of its presentation context, without a Part 10 header.

    Raises
    ------
    NotificationError
        It names no study or no instances, or breaks Table R.3.2-1; `status` is the DIMSE status that says so.
    """
    if sum(dataset.count(tag) for tag in _ITEM_TAGS) > max_items:
        raise NotificationError(f"more than {max_items} sequence items", _RESOURCE_LIMITATION)
    syntax = UID(transfer_syntax_uid)
    try:
        ds = read_dataset(io.BytesIO(dataset), syntax.is_implicit_VR, is_little_endian=syntax.is_little_endian)
        return _notification(Attributes(ds))
    except NotificationError:
        raise
    except Exception as exc:
        # What pydicom raises for bytes that are no dataset is not specified: EOFError, KeyError, RecursionError, ...
        raise NotificationError(f"not a readable dataset: {type(exc).__name__}", _PROCESSING_FAILURE) from exc


def _notification(ds: Attributes) -> Notification:
    study = _uid(ds, "StudyInstanceUID")
    instances = tuple(_instances(ds))
    if not instances:
        raise NotificationError("it names no instances: ReferencedSOPSequence is empty", _MISSING_VALUE)
    steps = (step.text("ReferencedSOPInstanceUID") for step in ds.items("ReferencedPerformedProcedureStepSequence"))
    return Notification(study, tuple(filter(is_uid, steps)), instances)


def _instances(ds: Attributes) -> Iterator[NotifiedInstance]:
    for series in _items(ds, "ReferencedSeriesSequence"):
        series_uid = _uid(series, "SeriesInstanceUID")
        for instance in _items(series, "ReferencedSOPSequence"):
            said = _value(instance, "InstanceAvailability")
            try:
                availability = Availability(said)
            except ValueError:
                raise NotificationError(f"InstanceAvailability is {said[:16]!r}", _INVALID_VALUE) from None
            yield NotifiedInstance(
                series_uid,
                _uid(instance, "ReferencedSOPClassUID"),
                _uid(instance, "ReferencedSOPInstanceUID"),
                availability,
                _value(instance, "RetrieveAETitle"),
            )


def _items(ds: Attributes, keyword: str) -> Iterator[Attributes]:
    if keyword not in ds:
        raise NotificationError(f"{keyword} is missing", _MISSING_ATTRIBUTE)
    return ds.items(keyword)


def _value(ds: Attributes, keyword: str) -> str:
    value = ds.text(keyword)
    if not value:
        absent = keyword not in ds
        problem = "is missing" if absent else "is empty"
        raise NotificationError(f"{keyword} {problem}", _MISSING_ATTRIBUTE if absent else _MISSING_VALUE)
    return value


def _uid(ds: Attributes, keyword: str) -> str:
    value = _value(ds, keyword)
    if not is_uid(value):
        raise NotificationError(f"{keyword} is no UID", _INVALID_VALUE)
    return value
