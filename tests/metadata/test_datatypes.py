"""Forms of attribute values, row by row of TF-3 Table 4.2.3.1.7-2."""

from __future__ import annotations

import pytest

from xca_imaging.metadata import datatypes

_FORMS = {
    datatypes.is_oid: (
        ("1.2.840.10008.1.2", "0.0", "2.25.329800735698586629295641978511506172918", "129.6.58.92.1.1"),
        ("", "1", "1.", ".1", "1..2", "1.02", "urn:oid:1.2", "1.2.a", "1.2 ", "1." + "2" * 63, "1.٢"),
    ),
    datatypes.is_home_community_id: (
        ("urn:oid:1.2.3", "urn:oid:" + "1." + "2" * 54),
        ("1.2.3", "urn:oid:", "urn:OID:1.2", "urn:oid:" + "1." + "2" * 55),
    ),
    datatypes.is_uuid: (
        ("urn:uuid:2f1a7cf4-8d0f-4f0e-9d4c-3f1f8f9f2c11",),
        (
            "2f1a7cf4-8d0f-4f0e-9d4c-3f1f8f9f2c11",
            "urn:uuid:2F1A7CF4-8d0f-4f0e-9d4c-3f1f8f9f2c11",
            "urn:uuid:2f1a7cf48d0f4f0e9d4c3f1f8f9f2c11",
            "urn:uuid:",
        ),
    ),
    datatypes.is_dtm: (
        ("2026", "202601", "20260102", "2026010203", "202601020304", "20260102030405", "20261231235959"),
        (
            "",
            "26",
            "20260",
            "20261301",
            "20260100",
            "20260132",
            "2026010224",
            "202601020360",
            "20260102030460",
            "20260102030405.5",
            "20260102+0100",
            "2026-01-02",
            "٢٠٢٦",
        ),
    ),
    datatypes.is_cx: (
        ("P1^^^&1.2.3&ISO", "a b-c^^^&2.16.840.1&ISO"),
        (
            "",
            "P1",
            "^^^&1.2.3&ISO",
            "P1^^^NS&1.2.3&ISO",
            "P1^^^&1.2.3&DNS",
            "P1^1^^&1.2.3&ISO",
            "P1^^^&1.2.3&ISO^PI",
            "P1^^^&x&ISO",
        ),
    ),
    datatypes.is_cxi: (
        (
            "1.2.3^^^^urn:ihe:iti:xds:2016:studyInstanceUID",
            "A-1^^^&1.2.3&ISO^urn:ihe:iti:xds:2013:accession",
            "A-1^^^NS^urn:ihe:iti:xds:2013:order",
            "A-1^^^NS&1.2.3&ISO^urn:ihe:iti:xds:2013:order",
        ),
        ("", "1.2.3", "1.2.3^^^^", "^^^^urn:x:y", "1^2^^^urn:x:y", "1^^^&1.2.3&DNS^urn:x:y", "1^^^^urn:x:y^more"),
    ),
    datatypes.is_hash: (
        ("da39a3ee5e6b4b0d3255bfef95601890afd80709", "DA39A3EE5E6B4B0D3255BFEF95601890AFD80709"),
        ("", "da39a3ee", "da39a3ee5e6b4b0d3255bfef95601890afd8070g", "da39a3ee5e6b4b0d3255bfef95601890afd807090"),
    ),
    datatypes.is_language: (("en", "en-US", "en-us", "zh-Hans-CN"), ("", "english language", "en_US", "-en")),
    datatypes.is_media_type: (
        ("application/dicom", "text/xml", "application/vnd.x+json"),
        ("", "dicom", "application/", "text/plain; charset=utf-8", "a/b/c"),
    ),
}


@pytest.mark.parametrize("fits", _FORMS, ids=lambda fits: fits.__name__)
def test_form(fits):
    right, wrong = _FORMS[fits]
    assert [text for text in right if not fits(text)] == []
    assert [text for text in wrong if fits(text)] == []


@pytest.mark.parametrize(
    ("time", "other", "later"),
    [
        ("20260102", "20260101", True),
        ("20260101", "20260102", False),
        ("20260101", "20260101", False),
        ("202601011200", "20260101", False),  # the day is the same, as far as it is known
        ("2027", "20261231235959", True),
    ],
)
def test_times_are_compared_as_far_as_both_are_precise(time, other, later):
    assert datatypes.is_later(time, other) is later
