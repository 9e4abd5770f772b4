"""Instance Availability Notifications: what is read of them, and the status of those that are not taken."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom.dsutils import encode

from xca_imaging.errors import NotificationError
from xca_imaging.imaging.availability import Availability, NotifiedInstance, read_notification
from xca_imaging.imaging.receiver import MAX_NOTIFICATION

STUDY, SERIES, STEP = "1.2.3", "1.2.3.1", "1.2.9"
CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2"


def item(**values: object) -> Dataset:
    ds = Dataset()
    for keyword, value in values.items():
        setattr(ds, keyword, value)
    return ds


def notification(count: int = 2, availability: str = "ONLINE") -> Dataset:
    sops = [
        item(
            ReferencedSOPClassUID=CT_IMAGE,
            ReferencedSOPInstanceUID=f"{SERIES}.{number}",
            InstanceAvailability=availability,
            RetrieveAETitle="ARCHIVE",
        )
        for number in range(count)
    ]
    step = item(ReferencedSOPClassUID="1.2.840.10008.3.1.2.3.3", ReferencedSOPInstanceUID=STEP)
    step.PerformedWorkitemCodeSequence = []
    return item(
        StudyInstanceUID=STUDY,
        ReferencedPerformedProcedureStepSequence=[step],
        ReferencedSeriesSequence=[item(SeriesInstanceUID=SERIES, ReferencedSOPSequence=sops)],
    )


def written(ds: Dataset, syntax: str = ExplicitVRLittleEndian) -> bytes:
    data = encode(ds, syntax == ImplicitVRLittleEndian, syntax != ExplicitVRBigEndian)
    assert data is not None
    return data


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian])
def test_what_it_says(syntax: str) -> None:
    found = read_notification(written(notification(), syntax), syntax)
    assert found.study_instance_uid == STUDY
    assert found.performed_procedure_steps == (STEP,)
    assert found.instances[1] == NotifiedInstance(SERIES, CT_IMAGE, f"{SERIES}.1", Availability.ONLINE, "ARCHIVE")
    assert len(found.instances) == 2
    assert found.retrieve_ae_titles == {"ARCHIVE"}


@pytest.mark.parametrize("availability", list(Availability))
def test_every_availability(availability: Availability) -> None:
    found = read_notification(written(notification(1, availability.value)), ExplicitVRLittleEndian)
    assert [each.availability for each in found.instances] == [availability]


def test_procedure_steps_may_be_empty_or_absent() -> None:
    for change in (
        lambda ds: setattr(ds, "ReferencedPerformedProcedureStepSequence", []),
        lambda ds: delattr(ds, "ReferencedPerformedProcedureStepSequence"),
    ):
        ds = notification()
        change(ds)
        assert read_notification(written(ds), ExplicitVRLittleEndian).performed_procedure_steps == ()


def _sop(ds: Dataset) -> Dataset:
    found: Dataset = ds.ReferencedSeriesSequence[0].ReferencedSOPSequence[0]
    return found


@pytest.mark.parametrize(
    ("change", "status", "said"),
    [
        (lambda ds: delattr(ds, "StudyInstanceUID"), 0x0120, "StudyInstanceUID is missing"),
        (lambda ds: setattr(ds, "StudyInstanceUID", ""), 0x0121, "StudyInstanceUID is empty"),
        (lambda ds: delattr(ds, "ReferencedSeriesSequence"), 0x0120, "ReferencedSeriesSequence"),
        (lambda ds: setattr(ds, "ReferencedSeriesSequence", []), 0x0121, "no instances"),
        (lambda ds: setattr(ds.ReferencedSeriesSequence[0], "ReferencedSOPSequence", []), 0x0121, "no instances"),
        (lambda ds: delattr(ds.ReferencedSeriesSequence[0], "SeriesInstanceUID"), 0x0120, "SeriesInstanceUID"),
        (lambda ds: delattr(_sop(ds), "ReferencedSOPInstanceUID"), 0x0120, "ReferencedSOPInstanceUID"),
        (lambda ds: delattr(_sop(ds), "ReferencedSOPClassUID"), 0x0120, "ReferencedSOPClassUID"),
        (lambda ds: delattr(_sop(ds), "InstanceAvailability"), 0x0120, "InstanceAvailability"),
        (lambda ds: setattr(_sop(ds), "InstanceAvailability", "SOMEWHERE"), 0x0106, "SOMEWHERE"),
        (lambda ds: setattr(_sop(ds), "RetrieveAETitle", ""), 0x0121, "RetrieveAETitle is empty"),
    ],
)
def test_what_breaks_the_table_is_refused(change: Callable[[Dataset], None], status: int, said: str) -> None:
    ds = notification()
    change(ds)
    with pytest.raises(NotificationError, match=said) as refused:
        read_notification(written(ds), ExplicitVRLittleEndian)
    assert refused.value.status == status


def test_a_uid_that_is_none_is_refused() -> None:
    data = written(notification()).replace(b"1.2.3.1.1\0", b"1.2.3.x.1\0")
    with pytest.raises(NotificationError, match="no UID") as refused:
        read_notification(data, ExplicitVRLittleEndian)
    assert refused.value.status == 0x0106


@pytest.mark.parametrize("data", [b"\x08\x00\x11", b"\xff" * 64, written(notification())[:-30]])
def test_bytes_that_are_no_dataset_are_refused(data: bytes) -> None:
    with pytest.raises(NotificationError) as refused:
        read_notification(data, ExplicitVRLittleEndian)
    assert refused.value.status in (0x0110, 0x0120, 0x0121, 0x0106)


def test_a_full_notification_fits_and_more_items_do_not() -> None:
    full = written(notification(5000))
    assert len(full) <= MAX_NOTIFICATION
    assert len(read_notification(full, ExplicitVRLittleEndian).instances) == 5000
    empty_items = io.BytesIO()
    empty_items.write(full)
    empty_items.write(b"\xfe\xff\x00\xe0\x00\x00\x00\x00" * 8000)
    with pytest.raises(NotificationError, match="items") as refused:
        read_notification(empty_items.getvalue(), ExplicitVRLittleEndian)
    assert refused.value.status == 0x0213
