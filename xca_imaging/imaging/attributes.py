"""Attribute values of a DICOM dataset as text, read without trusting it.

pydicom's own accessors convert, validate and warn through process-wide settings; what comes from a PACS or from another
community is often wrong in a harmless way (a time with colons, a text longer than its VR allows, bytes outside the
declared repertoire). Here a value is what its bytes say, decoded as far as possible, and nothing else happens.

References
----------
* DICOM PS3.5, 6.1 (character repertoires), 6.2 (value representations: padding, multiplicity)
* DICOM PS3.3, C.12.1.1.2 (Specific Character Set; items without one have that of the enclosing dataset)
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator

from pydicom.charset import decode_bytes, python_encoding
from pydicom.datadict import tag_for_keyword
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

# PS3.5 6.1.2.5.3: the delimiters at which code extensions return to the initial state.
_DELIMITERS = {0x0A, 0x0C, 0x0D, 0x5C, 0x5E, 0x3D}
_TEXT = frozenset({"LO", "LT", "PN", "SH", "ST", "UC", "UT"})  # PS3.5 6.2: the VRs that (0008,0005) affects


class Attributes:
    """One dataset or item, and the character set that its texts are in.

    Parameters
    ----------
    dataset : Dataset
        As read: elements may still be raw.
    inherited : tuple of str
        Python encodings of the enclosing dataset.
    """

    __slots__ = ("_dataset", "_encodings")

    def __init__(self, dataset: Dataset, inherited: tuple[str, ...] = ()) -> None:
        self._dataset = dataset
        self._encodings = inherited
        declared = self.values("SpecificCharacterSet")
        if declared:
            self._encodings = tuple(python_encoding.get(term, "") or "iso8859" for term in declared)

    def __contains__(self, keyword: str) -> bool:
        return _tag(keyword) in self._dataset

    def values(self, keyword: str) -> tuple[str, ...]:
        """Return the values of an element without padding; empty where it is absent or empty."""
        element = self._dataset.get_item(_tag(keyword)) if keyword in self else None
        if element is None or element.value is None:
            return ()
        value = element.value
        if isinstance(value, bytes):
            text = self._decode(value, element.VR if element.VR != "UN" else None)
        elif isinstance(element, RawDataElement) or isinstance(value, str) or not hasattr(value, "__iter__"):
            text = str(value)
        else:  # converted already: a multi-value or a person name
            text = "\\".join(map(str, value)) if not hasattr(value, "components") else str(value)
        found = tuple(part.strip(" \0\t\r\n") for part in text.split("\\"))
        return found if any(found) else ()

    def text(self, keyword: str) -> str:
        """Return the first value of an element, empty where there is none."""
        values = self.values(keyword)
        return values[0] if values else ""

    def number(self, keyword: str) -> int | None:
        """Return an IS element as a number, None where there is none or it is not one."""
        try:
            return int(self.text(keyword))
        except ValueError:
            return None

    def items(self, keyword: str) -> Iterator[Attributes]:
        """Iterate over the items of a sequence; none where it is absent, or no sequence."""
        if keyword not in self:
            return
        value = self._dataset[_tag(keyword)].value
        if isinstance(value, Sequence):
            for item in value:
                yield Attributes(item, self._encodings)

    def first(self, keyword: str) -> Attributes:
        """Return the first item of a sequence, an empty dataset where there is none."""
        return next(self.items(keyword), Attributes(Dataset()))

    def _decode(self, value: bytes, vr: str | None) -> str:
        if value.isascii() and b"\x1b" not in value:
            return value.decode("ascii")
        if vr is not None and vr not in _TEXT:
            return value.decode("ascii", "replace")
        if not self._encodings:
            # Nothing declared, so only ASCII is allowed. What comes all the same is UTF-8 more often than anything
            # else that passes for UTF-8; Latin-1 accepts every byte.
            try:
                return value.decode("utf-8")
            except UnicodeDecodeError:
                return value.decode("latin-1")
        if len(self._encodings) == 1 and b"\x1b" not in value:
            return value.decode(self._encodings[0], "replace")
        try:
            codecs.lookup(self._encodings[0])
            return decode_bytes(value, list(self._encodings), _DELIMITERS)
        except (LookupError, UnicodeError, UserWarning):
            return value.decode(self._encodings[0] or "latin-1", "replace")


def _tag(keyword: str) -> int:
    tag = tag_for_keyword(keyword)
    if tag is None:
        raise LookupError(f"{keyword!r} is not an attribute of PS3.6")
    return tag
