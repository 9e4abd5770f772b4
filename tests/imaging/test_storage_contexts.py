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
    assert pairs(propose([JPEG_2000, EXPLICIT], [CT, CT, ""])) == [(CT, JPEG_2000), (CT, EXPLICIT)]
    assert all(each.receives for each in propose([EXPLICIT], [CT]))


def test_what_has_no_pixels_is_not_asked_for_compressed() -> None:
    assert pairs(propose([JPEG_2000, EXPLICIT], [DOSE_REPORT])) == [(DOSE_REPORT, EXPLICIT)]


def test_unknown_classes_are_those_that_are_used_most() -> None:
    found = propose([EXPLICIT, IMPLICIT])
    assert len(found) <= 127
    assert pairs(found)[:2] == [(CT, EXPLICIT), (CT, IMPLICIT)]
    assert DOSE_REPORT in {each.abstract_syntax for each in found[:20]}
    assert len({each.abstract_syntax for each in propose([EXPLICIT])}) == len(storage_contexts._BY_USAGE)


def test_never_more_than_fit_beside_the_service_itself() -> None:
    assert len(propose([])) == 127
    assert len(propose([f"1.2.{n}" for n in range(300)], [CT])) == 127


def test_many_known_classes_keep_one_syntax_each() -> None:
    classes = [f"1.2.3.{n}" for n in range(100)]
    found = pairs(propose([EXPLICIT, IMPLICIT], classes))
    assert [sop_class for sop_class, _ in found] == classes
    assert {syntax for _, syntax in found} == {EXPLICIT}


def test_the_table_names_storage_classes_each_once() -> None:
    table = storage_contexts._BY_USAGE
    assert len(set(table)) == len(table)
    assert all("Storage" in UID(uid).name for uid in table)
