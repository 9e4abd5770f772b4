"""Which contexts a C-GET proposes."""

from __future__ import annotations

from pydicom.uid import UID

from xca_imaging import uids
from xca_imaging.imaging.backends import storage_contexts
from xca_imaging.imaging.backends.storage_contexts import propose

EXPLICIT, IMPLICIT = uids.EXPLICIT_VR_LITTLE_ENDIAN, uids.IMPLICIT_VR_LITTLE_ENDIAN
JPEG_2000 = "1.2.840.10008.1.2.4.90"
CT, DOSE_REPORT = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.88.67"


def pairs(proposals: object) -> list[tuple[str, str]]:
    return [(each.abstract_syntax, *each.transfer_syntaxes) for each in proposals]  # type: ignore[attr-defined]


def test_known_classes_alone_each_with_each_syntax() -> None:
    assert pairs(propose([JPEG_2000, EXPLICIT], [CT, CT, ""])) == [(CT, EXPLICIT), (CT, JPEG_2000)]
    assert all(each.receives for each in propose([EXPLICIT], [CT]))


def test_what_has_no_pixels_is_not_asked_for_compressed() -> None:
    assert pairs(propose([JPEG_2000, EXPLICIT], [DOSE_REPORT])) == [(DOSE_REPORT, EXPLICIT)]


def test_unknown_classes_are_those_that_are_used_most() -> None:
    found = propose([EXPLICIT, IMPLICIT])
    assert len(found) <= 127
    assert {(CT, EXPLICIT), (CT, IMPLICIT), (DOSE_REPORT, EXPLICIT)} <= set(pairs(found))
    assert len({each.abstract_syntax for each in propose([EXPLICIT])}) == len(storage_contexts._BY_USAGE)


def test_never_more_than_fit_beside_the_service_itself() -> None:
    assert len(propose([])) == 127
    assert len(propose([f"1.2.{n}" for n in range(300)], [CT])) == 127


def test_every_class_has_a_context_before_one_has_two() -> None:
    accept = [JPEG_2000, EXPLICIT, IMPLICIT, "1.2.840.10008.1.2.4.70", "1.2.840.10008.1.2.5"]
    found = pairs(propose(accept))
    assert {(uid, EXPLICIT) for uid in storage_contexts._BY_USAGE} <= set(found)
    assert {(CT, syntax) for syntax in accept} <= set(found)
    classes = [f"1.2.3.{n}" for n in range(100)]
    found = pairs(propose([EXPLICIT, IMPLICIT], classes))
    assert {(uid, EXPLICIT) for uid in classes} <= set(found)
    assert len(found) == 127


def test_where_nothing_uncompressed_is_accepted_only_images_are_asked_for() -> None:
    found = pairs(propose([JPEG_2000]))
    assert (CT, JPEG_2000) in found
    assert DOSE_REPORT not in {sop_class for sop_class, _ in found}


def test_the_table_names_storage_classes_each_once() -> None:
    table = storage_contexts._BY_USAGE
    assert len(set(table)) == len(table)
    assert all("Storage" in UID(uid).name for uid in table)
