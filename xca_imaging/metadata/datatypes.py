"""Data types of metadata attributes: whether a text has the form that the Technical Framework asks for.

XCN and XON are HL7 v2 fields of many components, of which XDS restricts few: names and ids are looked at, the rest is
kept as it is.

References
----------
* IHE ITI TF-3, 4.2.3.1.7 (Table 4.2.3.1.7-2: CX, CXi, DTM, HD, OID, UUID, XCN, XON, ...)
* RFC 5646 (language tags), RFC 2046 and RFC 6838 4.2 (media types)
"""

from __future__ import annotations

import re

from xca_imaging import uids

# First arcs over 2 are no OIDs, yet ids made of IP addresses (129.6.58.92.1) are in use and in IHE's own test data.
_OID = r"(?:0|[1-9][0-9]*)(?:\.(?:0|[1-9][0-9]*))+"
_DTM = re.compile(r"[0-9]{4}(?:[0-9]{2}){0,5}")
_UUID = re.compile(r"urn:uuid:[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_CX = re.compile(rf"[^\^&]+\^\^\^&{_OID}&ISO")
_CXI = re.compile(rf"[^\^&]+\^\^\^(?:[^\^&]+|[^\^&]*&{_OID}&ISO)?\^[^\^&]+")
_HD = re.compile(rf"&{_OID}&ISO")
_HASH = re.compile(r"[0-9a-fA-F]{40}")
_LANGUAGE = re.compile(r"[A-Za-z]{1,8}(?:-[A-Za-z0-9]{1,8})*")
_MEDIA_TYPE = re.compile(r"[A-Za-z0-9][\w!#$&^.+-]*/[A-Za-z0-9][\w!#$&^.+-]*", re.ASCII)
_DTM_RANGES = ((1, 12), (1, 31), (0, 23), (0, 59), (0, 59))  # month, day, hour, minute, second


def is_oid(text: str, *, max_length: int = 64) -> bool:
    """Whether it is an OID without prefix; at most 64 characters, as DICOM and the Technical Framework have it."""
    return len(text) <= max_length and re.fullmatch(_OID, text) is not None


def is_home_community_id(text: str) -> bool:
    """Whether it is `urn:oid:` and an OID, at most 64 characters in all (TF-2 3.38)."""
    return len(text) <= 64 and text.startswith(uids.OID_PREFIX) and is_oid(text.removeprefix(uids.OID_PREFIX))


def is_uuid(text: str) -> bool:
    """Whether it is `urn:uuid:` and a UUID in lower case."""
    return _UUID.fullmatch(text) is not None


def is_dtm(text: str) -> bool:
    """Whether it is a time in UTC, `YYYY[MM[DD[hh[mm[ss]]]]]`, without zone and fraction."""
    if _DTM.fullmatch(text) is None:
        return False
    parts = [int(text[i : i + 2]) for i in range(4, len(text), 2)]
    return all(low <= part <= high for part, (low, high) in zip(parts, _DTM_RANGES, strict=False))


def is_later(time: str, other: str) -> bool:
    """Whether one DTM is later than another, as far as both are precise."""
    length = min(len(time), len(other))
    return time[:length] > other[:length]


def is_cx(text: str) -> bool:
    """Whether it is a patient identifier as XDS restricts CX: `id^^^&OID&ISO`."""
    return _CX.fullmatch(text) is not None


def is_cxi(text: str) -> bool:
    """Whether it is a reference id: `id^^^authority^type`, the authority empty, a name, or `&OID&ISO`."""
    return _CXI.fullmatch(text) is not None


def is_hd(text: str) -> bool:
    """Whether it is an assigning authority as XDS restricts HD: `&OID&ISO`, without namespace."""
    return _HD.fullmatch(text) is not None


def is_xon(text: str) -> bool:
    """Whether it is an organization: a name (XON.1); an id (XON.10) is an OID or has an authority (XON.6)."""
    parts = [*text.split("^"), *[""] * 10]
    authority, identifier = parts[5], parts[9]
    if not parts[0] or (authority and not is_hd(authority)):
        return False
    return not identifier or bool(authority) or is_oid(identifier)


def is_xcn(text: str) -> bool:
    """Whether it is a person: an id (XCN.1) or a name (XCN.2 to .4); an authority (XCN.9) is `&OID&ISO`."""
    parts = [*text.split("^"), *[""] * 9]
    return any(parts[:4]) and (not parts[8] or is_hd(parts[8]))


def is_recipient(text: str) -> bool:
    """Whether it is an intended recipient: an organization, a person or both, then telecommunication: XON|XCN|XTN."""
    organization, person, telecommunication, *more = [*text.split("|"), "", ""]
    if any(more) or not (organization or person or telecommunication):
        return False
    return (not organization or is_xon(organization)) and (not person or is_xcn(person))


def is_hash(text: str) -> bool:
    """Whether it is a SHA-1 digest in hexadecimal, in upper or lower case."""
    return _HASH.fullmatch(text) is not None


def is_language(text: str) -> bool:
    """Whether it has the form of a language tag."""
    return _LANGUAGE.fullmatch(text) is not None


def is_media_type(text: str) -> bool:
    """Whether it is type/subtype, without parameters."""
    return _MEDIA_TYPE.fullmatch(text) is not None
