"""The codes and media types that an affinity domain allows.

References
----------
* IHE ITI TF-3, 4.2.3.1.2 (coding schemes and codes are the affinity domain's); TF-2, 3.42.4.1.3.3 (checks)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from xca_imaging.metadata.model import Code

ATTRIBUTES = (
    "classCode",
    "typeCode",
    "formatCode",
    "healthcareFacilityTypeCode",
    "practiceSettingCode",
    "confidentialityCode",
    "eventCodeList",
    "contentTypeCode",
    "codeList",
    "associationDocumentation",
)
"""Coded attributes, as errors name them."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What is allowed. An attribute that is not named takes any code, no media types named are any."""

    codes: Mapping[str, frozenset[tuple[str, str]]] = field(default_factory=dict)
    """(code, coding scheme) by attribute."""
    media_types: frozenset[str] = frozenset()

    def allows(self, attribute: str, code: Code) -> bool:
        """Whether a code may stand in an attribute; its display name is not compared."""
        allowed = self.codes.get(attribute)
        return allowed is None or (code.code, code.scheme) in allowed

    def allows_media_type(self, media_type: str) -> bool:
        """Whether documents may be of a media type."""
        return not self.media_types or media_type.lower() in self.media_types


ANY = Vocabulary()
"""Whatever is written."""
