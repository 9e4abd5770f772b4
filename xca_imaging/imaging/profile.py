"""The profile of an affinity domain: codes, value sets and quirks with which manifests are published.

A profile is a TOML file of `profiles/`, or one beside the configuration that `extends` such a file. What it may hold
stands, with its sources, in `profiles/ihe.toml`.

References
----------
* IHE ITI TF-3, 4.2.3.2 (attributes of a DocumentEntry), 4.2.3.1.2 (codes: scheme OIDs)
* DICOM PS3.16, Table 8-1 (coding schemes), CID 29 (acquisition modalities), Annex L (body part examined)
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from datetime import UTC, tzinfo
from pathlib import Path
from typing import Annotated, Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import AfterValidator, BeforeValidator, Field, InstanceOf, ValidationError

from xca_imaging import uids
from xca_imaging.data_files import data_folder
from xca_imaging.errors import ConfigurationError
from xca_imaging.metadata import datatypes
from xca_imaging.metadata.model import Code
from xca_imaging.metadata.vocabulary import ANY, ATTRIBUTES, Vocabulary
from xca_imaging.settings import Oid, Section, Settings

_MAX_CHAIN = 8
"""Files that extend one another: a domain over a network over IHE is three; a circle ends here."""


def _code(value: object) -> Code:
    if isinstance(value, Code):
        return value
    if not isinstance(value, dict) or not {"code", "scheme"} <= value.keys() <= {"code", "scheme", "display"}:
        raise ValueError('write a code as { code = "...", scheme = "...", display = "..." }')
    if not all(isinstance(text, str) for text in value.values()) or not value["code"] or not value["scheme"]:
        raise ValueError("code, scheme and display are texts, code and scheme not empty")
    return Code(**value)


def _codes(value: object) -> tuple[Code, ...]:
    if not isinstance(value, list | tuple) or not value:
        raise ValueError("write a list of at least one code")
    return tuple(map(_code, value))


def _zone(value: object) -> tzinfo:
    if isinstance(value, tzinfo):
        return value
    if value == "UTC":  # the one zone that needs no time zone database
        return UTC
    try:
        return ZoneInfo(value)  # type: ignore[arg-type]
    except (ZoneInfoNotFoundError, ValueError, TypeError, OSError):
        raise ValueError('write an IANA time zone, for example "Europe/Berlin" or "UTC"') from None


def _language(value: str) -> str:
    if not datatypes.is_language(value):
        raise ValueError('write a language tag, for example "en-US"')
    return value


def _vocabulary(value: object) -> object:
    if not isinstance(value, dict):
        raise ValueError("must be a table of lists")
    if unknown := sorted(set(value) - {*ATTRIBUTES, "mimeType"}):
        raise ValueError(f"{unknown[0]!r} is none of {', '.join((*ATTRIBUTES, 'mimeType'))}")
    media_types = value.get("mimeType", [])
    if not isinstance(media_types, list) or not all(isinstance(each, str) for each in media_types):
        raise ValueError("mimeType must be a list of media types")
    codes = {name: _codes(listed) for name, listed in value.items() if name != "mimeType"}
    return Vocabulary(
        {name: frozenset((code.code, code.scheme) for code in listed) for name, listed in codes.items()},
        frozenset(each.lower() for each in media_types),
    )


_Code = Annotated[Code, BeforeValidator(_code)]


class Region(Section):
    """A value of `[regions]`: a SNOMED CT concept."""

    code: str
    display: str = ""


class Codes(Section):
    """`[codes]`: the coded attributes that do not come from the images."""

    format: _Code
    class_: Annotated[_Code, Field(alias="class")]
    type: _Code
    content_type: _Code
    confidentiality: Annotated[tuple[Code, ...], BeforeValidator(_codes)]
    healthcare_facility_type: _Code
    practice_setting: _Code


class Reports(Section):
    """`[reports]`: the codes of reports that are registered beside a manifest."""

    class_: Annotated[_Code, Field(alias="class")]
    type: _Code
    pdf_format: _Code
    cda_format: _Code


class Profile(Section):
    """A whole profile."""

    language: Annotated[str, AfterValidator(_language)]
    timezone: Annotated[InstanceOf[tzinfo], BeforeValidator(_zone)]
    accession_assigning_authority: Oid = ""
    author_institution: str = ""
    codes: Codes
    reports: Reports
    vocabulary: Annotated[InstanceOf[Vocabulary], BeforeValidator(_vocabulary)] = ANY
    coding_schemes: dict[str, Oid]
    modalities: dict[str, str]
    regions: dict[str, Region]

    def registered(self, code: Code) -> Code | None:
        """Return a code of an image with the OID of its scheme, None where the profile does not know the scheme."""
        scheme = self.coding_schemes.get(code.scheme)
        return Code(code.code, scheme, code.display) if scheme else None

    def modality_codes(self, modalities: Iterable[str]) -> list[Code]:
        """Return the codes of acquisition modalities; the others stay out."""
        return [
            Code(modality, uids.DICOM_CONTROLLED_TERMINOLOGY, self.modalities[modality])
            for modality in sorted(set(modalities))
            if modality in self.modalities
        ]

    def region_code(self, body_part_examined: str) -> Code | None:
        """Return the anatomic region of a Body Part Examined, None where the term is not a defined one."""
        region = self.regions.get(body_part_examined.upper())
        scheme = self.coding_schemes.get("SCT")
        return Code(region.code, scheme, region.display) if region and scheme else None


def load_profile(settings: Settings) -> Profile:
    """Return the profile that `node.profile` names: a name of `profiles/`, or the path of a `.toml` file.

    Raises
    ------
    ConfigurationError
        There is no such profile, or it is wrong; file and key say where.
    """
    name = settings.node.profile
    if name.endswith(".toml"):
        return read_profile(settings.path(name))
    folder = data_folder("profiles")
    file = folder / f"{name}.toml"
    if Path(name).name != name or not file.is_file():
        known = ", ".join(sorted(each.stem for each in folder.glob("*.toml")))
        raise ConfigurationError(
            str(settings.file), "node.profile", f"there is no profile {name!r}", f"known: {known}; or a .toml file"
        )
    return read_profile(file)


def read_profile(file: Path) -> Profile:
    """Read a profile file and what it extends."""
    data = _tables(file, _MAX_CHAIN)
    try:
        return Profile.model_validate(data)
    except ValidationError as exc:
        error = exc.errors()[0]
        key = ".".join(map(str, error["loc"]))
        raise ConfigurationError(str(file), key, f"{error['input']!r} is not valid", error["msg"]) from None


def _tables(file: Path, depth: int) -> dict[str, Any]:
    try:
        with file.open("rb") as stream:
            data = tomllib.load(stream)
    except OSError as exc:
        raise ConfigurationError(str(file), "", f"cannot be read: {exc.strerror}", "check node.profile") from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise ConfigurationError(str(file), "", f"is not TOML: {exc}", "compare with profiles/ihe.toml") from exc
    base = data.pop("extends", "")
    if not base:
        return data
    if not isinstance(base, str) or depth <= 1:
        raise ConfigurationError(str(file), "extends", f"{base!r} cannot be followed", "name one other profile")
    parent = file.parent / base if base.endswith(".toml") else data_folder("profiles") / f"{Path(base).name}.toml"
    return _merged(_tables(parent, depth - 1), data)


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Tables key by key, one level deep: a code is replaced as a whole."""
    merged = dict(base)
    for key, value in over.items():
        known = merged.get(key)
        merged[key] = known | value if isinstance(known, dict) and isinstance(value, dict) else value
    return merged
