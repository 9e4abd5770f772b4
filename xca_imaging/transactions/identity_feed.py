"""What a patient identity feed says, whatever its form: ITI-8 in HL7 v2, ITI-44 in HL7 V3.

References
----------
* IHE ITI TF-2, 3.8 and 3.44 (Patient Identity Feed): add, revise, merge
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from xca_imaging.errors import XcaImagingError
from xca_imaging.metadata import datatypes


@dataclass(frozen=True, slots=True)
class Added:
    """A patient has been registered. The ids are CX (`id^^^&OID&ISO`), one for each domain that the feed names."""

    patient_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Revised:
    """Something about a registered patient has changed."""

    patient_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Merged:
    """Two records were of one patient: `subsumed` ids are given up for the surviving one of the same domain."""

    patient_ids: tuple[str, ...]
    subsumed: tuple[str, ...]


Feed = Added | Revised | Merged


@dataclass(frozen=True, slots=True)
class FeedMessage:
    """One message of a feed: `message_id` is MSH-10, or `root@extension` of the HL7 V3 message."""

    message_id: str
    feed: Feed


class FeedRefused(XcaImagingError):
    """A feed was understood and cannot be applied; the text says why, without demographics."""


_ESCAPES = {"|": "\\F\\", "^": "\\S\\", "~": "\\R\\", "&": "\\T\\", "\\": "\\E\\"}
_CHARACTERS = {sequence: character for character, sequence in _ESCAPES.items()}


def escape(text: str) -> str:
    """Return a text as an HL7 v2 value: delimiters escaped (HL7 v2.5, 2.7.1)."""
    return "".join(_ESCAPES.get(character, character) for character in text)


def patient_id_of(number: str, authority: str) -> str:
    """Return the CX of an identifier as XDS restricts it (ITI TF-3, 4.2.3.1.7)."""
    return f"{escape(number)}^^^&{authority}&ISO"


def is_usable(patient_id: str, *, max_length: int = 256) -> bool:
    """Whether a registry can know a patient by an id: one that a submission can name, without control characters."""
    return len(patient_id) <= max_length and patient_id.isprintable() and datatypes.is_cx(patient_id)


def identifier_of(patient_id: str) -> tuple[str, str]:
    """Return number, without escapes, and assigning authority of a CX; the reverse of `patient_id_of`."""
    number, _, authority = patient_id.partition("^^^&")
    return re.sub(r"\\[FSRTE]\\", lambda found: _CHARACTERS[found[0]], number), authority.removesuffix("&ISO")
