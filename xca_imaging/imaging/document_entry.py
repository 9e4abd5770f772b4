"""A manifest as document metadata: DocumentEntry, SubmissionSet and how they hang together.

Two ids must not be confused: `DocumentEntry.repository_unique_id` says where the manifest is (ITI-43), the Retrieve
Location UID inside the manifest where the images are (RAD-69).

References
----------
* IHE RAD TF-3, 4.68.4.1.2.3.2 (mapping of the Key Object Selection document to metadata)
* IHE ITI TF-3, 4.2.3.2 (DocumentEntry), 4.2.3.3 (SubmissionSet), 4.2.3.1.7 (CX, CXi, DTM), 4.2.2.2 (RPLC)
* HL7 2.5, 2.7.1 (escape sequences), 2.A.88 (XPN), 3.4.2 (PID)
* DICOM PS3.5, 6.2 (DA, TM, PN and the order of its components)
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone, tzinfo

from xca_imaging import uids
from xca_imaging.imaging.manifest import Manifest
from xca_imaging.imaging.profile import Profile
from xca_imaging.imaging.reports import ENCAPSULATED_PDF, Report
from xca_imaging.imaging.study import ImagingRequest, Patient, SeriesFacts, StudyContents
from xca_imaging.metadata.model import Association, Author, Code, DocumentEntry, Identifier, Submission, SubmissionSet

_MAX_TITLE = 128  # ITI TF-3, 4.2.3.2: title

# HL7 2.5, 2.7.1; the escape character first.
_ESCAPES = {"\\": "\\E\\", "|": "\\F\\", "^": "\\S\\", "&": "\\T\\", "~": "\\R\\"}

_DATE = re.compile(r"([0-9]{4})\.?([0-9]{2})\.?([0-9]{2})")  # PS3.5 6.2, DA; with dots before 1993
_TIME = re.compile(r"([0-9]{2})(?::?([0-9]{2})(?::?([0-9]{2})(?:\.[0-9]*)?)?)?")  # TM; with colons before 1993
_OFFSET = re.compile(r"([+-])([0-9]{2})([0-9]{2})")  # (0008,0201)


def describe(
    manifest: Manifest,
    content: bytes,
    contents: StudyContents,
    *,
    profile: Profile,
    patient_id: Identifier,
    source_patient_id: Identifier,
    source_id: str,
    repository_unique_id: str = "",
    replaces: str = "",
    now: datetime,
    uid_factory: Callable[[], str],
    uuid_factory: Callable[[], str],
) -> Submission:
    """Return the submission that registers a manifest (RAD-68).

    Parameters
    ----------
    manifest, content, contents
        The manifest, its Part 10 file, and what it was made of.
    patient_id : Identifier
        Of the affinity domain.
    source_patient_id : Identifier
        Of the department.
    source_id : str
        OID of the source of the submission.
    repository_unique_id : str
        Of the repository that will hold the manifest; it fills it in itself where it is left out.
    replaces : str
        entryUUID of the registered manifest that this one replaces (RPLC).
    now : datetime
        With zone: the submission time.
    uid_factory, uuid_factory : callable
        New OIDs (for the SubmissionSet) and `urn:uuid:` ids (for the objects).
    """
    codes = profile.codes
    authors = _authors(contents, profile)
    started = to_dtm(manifest.study_date, manifest.study_time, manifest.timezone_offset, profile.timezone)
    created = to_dtm(manifest.content_date, manifest.content_time, manifest.timezone_offset, profile.timezone)
    entry = DocumentEntry(
        entry_uuid=uuid_factory(),
        unique_id=manifest.sop_instance_uid,
        patient_id=str(patient_id),
        mime_type=uids.MIME_DICOM,
        repository_unique_id=repository_unique_id,
        title=_title(contents),
        creation_time=created,
        # The study has one time. As in MADO it is both ends: the last acquisition is not known from a query.
        service_start_time=started,
        service_stop_time=started,
        hash=hashlib.sha1(content, usedforsecurity=False).hexdigest(),
        size=len(content),
        language_code=profile.language,
        source_patient_id=str(source_patient_id),
        source_patient_info=tuple(_patient_info(manifest.patient, source_patient_id)),
        class_code=codes.class_,
        type_code=_type_code(contents.facts.procedure_codes, profile),
        format_code=codes.format,
        healthcare_facility_type_code=codes.healthcare_facility_type,
        practice_setting_code=codes.practice_setting,
        confidentiality_codes=codes.confidentiality,
        event_codes=tuple(_event_codes(contents, profile)),
        authors=authors,
        reference_ids=tuple(_reference_ids(manifest, contents.requests, profile)),
    )
    submission_set = SubmissionSet(
        entry_uuid=uuid_factory(),
        unique_id=uid_factory(),
        patient_id=str(patient_id),
        source_id=source_id,
        submission_time=now.astimezone(UTC).strftime("%Y%m%d%H%M%S"),
        content_type_code=codes.content_type,
        authors=authors,
    )
    associations = [
        Association(
            entry_uuid=uuid_factory(),
            type=uids.HAS_MEMBER,
            source=submission_set.entry_uuid,
            target=entry.entry_uuid,
            submission_set_status="Original",
        )
    ]
    if replaces:
        associations.append(
            Association(entry_uuid=uuid_factory(), type=uids.RPLC, source=entry.entry_uuid, target=replaces)
        )
    return Submission((submission_set,), (entry,), (), tuple(associations))


def describe_report(
    report: Report,
    beside: DocumentEntry,
    *,
    profile: Profile,
    now: datetime,
    uid_factory: Callable[[], str],
    uuid_factory: Callable[[], str],
) -> DocumentEntry:
    """Return the entry of a report of a study.

    The document is not the DICOM object that it lies in, so it has a uniqueId of its own; the object is in its
    referenceIdList.

    Parameters
    ----------
    beside : DocumentEntry
        Of the study's manifest: patient, time, author and the rest of what both have in common.
    """
    codes = profile.reports
    typed = [registered for code in report.codes if (registered := profile.registered(code))]
    is_pdf = report.sop_class_uid == ENCAPSULATED_PDF
    created = to_dtm(report.content_date, report.content_time, report.timezone_offset, profile.timezone)
    return replace(
        beside,
        entry_uuid=uuid_factory(),
        unique_id=uid_factory(),
        mime_type=report.mime_type,
        title=(report.title or beside.title)[:_MAX_TITLE],
        creation_time=created or now.astimezone(UTC).strftime("%Y%m%d%H%M%S"),
        hash=hashlib.sha1(report.content, usedforsecurity=False).hexdigest(),
        size=len(report.content),
        class_code=codes.class_,
        type_code=typed[0] if typed else codes.type,
        format_code=codes.pdf_format if is_pdf else codes.cda_format,
        reference_ids=(*beside.reference_ids, report_reference_id(report.sop_instance_uid)),
    )


def report_reference_id(sop_instance_uid: str) -> str:
    """Return the CXi of the DICOM object that a report lies in."""
    return f"{sop_instance_uid}^^^^{uids.REFERENCE_UNIQUE_ID}"


def with_documents(
    submission: Submission, documents: Sequence[DocumentEntry], uuid_factory: Callable[[], str]
) -> Submission:
    """Return a submission with more documents in its SubmissionSet."""
    (submission_set,) = submission.submission_sets
    memberships = tuple(
        Association(
            entry_uuid=uuid_factory(),
            type=uids.HAS_MEMBER,
            source=submission_set.entry_uuid,
            target=document.entry_uuid,
            submission_set_status="Original",
        )
        for document in documents
    )
    return replace(
        submission,
        documents=(*submission.documents, *documents),
        associations=(*submission.associations, *memberships),
    )


def describe_deprecation(
    entries: Sequence[DocumentEntry],
    *,
    profile: Profile,
    source_id: str,
    now: datetime,
    uid_factory: Callable[[], str],
    uuid_factory: Callable[[], str],
) -> Submission:
    """Return the submission that deprecates registered documents of one patient (ITI-57).

    References
    ----------
    * IHE ITI XDS Metadata Update, 3.57.4.1.3.3.2 (Update DocumentEntry AvailabilityStatus)
    """
    submission_set = SubmissionSet(
        entry_uuid=uuid_factory(),
        unique_id=uid_factory(),
        patient_id=entries[0].patient_id,
        source_id=source_id,
        submission_time=now.astimezone(UTC).strftime("%Y%m%d%H%M%S"),
        content_type_code=profile.codes.content_type,
    )
    associations = tuple(
        Association(
            entry_uuid=uuid_factory(),
            type=uids.UPDATE_AVAILABILITY_STATUS,
            source=submission_set.entry_uuid,
            target=entry.entry_uuid,
            original_status=uids.APPROVED,
            new_status=uids.DEPRECATED,
        )
        for entry in entries
    )
    return Submission((submission_set,), (), (), associations)


def same_description(entry: DocumentEntry, other: DocumentEntry) -> bool:
    """Tell whether two entries say the same of a study: everything that `describe` maps, but for times and ids of the
    manifest itself. Display names and the order of lists carry no meaning."""
    return _said(entry) == _said(other)


def _said(entry: DocumentEntry) -> tuple[object, ...]:
    def code(value: Code | None) -> tuple[str, str] | None:
        return (value.code, value.scheme) if value else None

    def codes(values: Iterable[Code]) -> frozenset[tuple[str, str] | None]:
        return frozenset(map(code, values))

    return (
        entry.patient_id,
        entry.mime_type,
        entry.title,
        entry.service_start_time,
        entry.service_stop_time,
        entry.language_code,
        entry.source_patient_id,
        frozenset(entry.source_patient_info),
        code(entry.class_code),
        code(entry.type_code),
        code(entry.format_code),
        code(entry.healthcare_facility_type_code),
        code(entry.practice_setting_code),
        codes(entry.confidentiality_codes),
        codes(entry.event_codes),
        frozenset(entry.authors),
        frozenset(entry.reference_ids),
    )


# --------------------------------------------------------------------------------------------------------------------
# Attributes
# --------------------------------------------------------------------------------------------------------------------


def escape(text: str) -> str:
    """Return a text as an HL7 v2 value: delimiters escaped."""
    return "".join(_ESCAPES.get(character, character) for character in text)


def study_reference_id(study_instance_uid: str) -> str:
    """Return the CXi of a study: what FindDocumentsByReferenceId looks for."""
    return f"{study_instance_uid}^^^^{uids.REFERENCE_STUDY_INSTANCE_UID}"


def to_dtm(day: str, time: str, offset: str, zone: tzinfo) -> str:
    """Return a DICOM date and time as DTM in UTC, as precise as it is; empty where there is no usable date.

    Parameters
    ----------
    offset : str
        Timezone Offset From UTC (0008,0201); where it is empty or unusable, `zone` is what the date and time are in.
    """
    date_match = _DATE.fullmatch(day)
    if not date_match:
        return ""
    year, month, day_of_month = map(int, date_match.groups())
    time_match = _TIME.fullmatch(time)
    hour, minute, second = time_match.groups() if time_match else (None, None, None)
    try:
        if hour is None:
            return datetime(year, month, day_of_month, tzinfo=UTC).strftime("%Y%m%d")
        local = datetime(
            year,
            month,
            day_of_month,
            int(hour),
            int(minute or 0),
            min(int(second or 0), 59),  # PS3.5: 60 is a leap second
            tzinfo=zone_of(offset, zone),
        )
        moment = local.astimezone(UTC)
    except (ValueError, OverflowError):
        return ""
    # An hour without minutes can be told in UTC only where the offset is whole hours.
    precision = "%Y%m%d%H" + ("%M" if minute or moment.minute else "") + ("%S" if second else "")
    return moment.strftime(precision).zfill(8)


def zone_of(offset: str, default: tzinfo) -> tzinfo:
    """Return the zone of a Timezone Offset From UTC (0008,0201), the default where it is empty or unusable."""
    match = _OFFSET.fullmatch(offset)
    if not match:
        return default
    delta = timedelta(hours=int(match[2]), minutes=int(match[3]))
    if delta >= timedelta(hours=24):
        return default
    return timezone(-delta if match[1] == "-" else delta)


def _title(contents: StudyContents) -> str:
    title = contents.facts.description or "/".join(sorted(_modalities(contents)))
    return title[:_MAX_TITLE]


def _modalities(contents: StudyContents) -> set[str]:
    return {series.facts.modality for series in contents.series if series.instances and series.facts.modality}


def _event_codes(contents: StudyContents, profile: Profile) -> list[Code]:
    """Acquisition modalities and anatomic regions of the referenced images, and nothing else."""
    found: dict[tuple[str, str], Code] = {}
    for code in profile.modality_codes(_modalities(contents)):
        found.setdefault((code.code, code.scheme), code)
    for series in contents.series:
        for code in _regions(series.facts, profile) if series.instances else ():
            found.setdefault((code.code, code.scheme), code)
    return list(found.values())


def _regions(series: SeriesFacts, profile: Profile) -> list[Code]:
    coded = [code for region in series.anatomic_regions if (code := profile.registered(region))]
    if coded:
        return coded
    region = profile.region_code(series.body_part_examined)
    return [region] if region else []


def _type_code(procedure_codes: tuple[Code, ...], profile: Profile) -> Code:
    """The procedure, where there is exactly one and its coding scheme has an OID; a group has no code of its own."""
    registered = profile.registered(procedure_codes[0]) if len(procedure_codes) == 1 else None
    return registered or profile.codes.type


def _authors(contents: StudyContents, profile: Profile) -> tuple[Author, ...]:
    """The institutions that made the images; else that of the profile."""
    names = [series.facts.institution_name for series in contents.series if series.facts.institution_name]
    names = names or [profile.author_institution]
    institutions = tuple(dict.fromkeys(escape(name) for name in names if name))
    return (Author(institutions=institutions),) if institutions else ()


def _reference_ids(manifest: Manifest, requests: Iterable[ImagingRequest], profile: Profile) -> list[str]:
    found = [study_reference_id(manifest.study_instance_uid)]
    for request in requests:
        if request.accession_number:
            authority = request.accession_issuer or profile.accession_assigning_authority
            issued_by = f"&{authority}&ISO" if authority else ""
            found.append(f"{escape(request.accession_number)}^^^{issued_by}^{uids.REFERENCE_ACCESSION}")
        if request.placer_order_number and request.placer_issuer:  # an order number without authority is not allowed
            issued_by = f"&{request.placer_issuer}&ISO"
            found.append(f"{escape(request.placer_order_number)}^^^{issued_by}^{uids.REFERENCE_ORDER}")
    return list(dict.fromkeys(found))


def _patient_info(patient: Patient, source_patient_id: Identifier) -> list[str]:
    """The patient as PID fields."""
    info = [f"PID-3|{source_patient_id}"]
    name = _person_name(patient.name)
    if name:
        info.append(f"PID-5|{name}")
    birth = _DATE.fullmatch(patient.birth_date)
    if birth:
        info.append("PID-7|" + "".join(birth.groups()))
    if patient.sex:
        # PS3.3 C.7.1.1 knows M, F and O; HL7 table 0001 has U for what is none of its values.
        info.append(f"PID-8|{patient.sex if patient.sex in ('M', 'F', 'O') else 'U'}")
    return info


def _person_name(name: str) -> str:
    """Return a PN as XPN: the first representation that is there, prefix and suffix in HL7's order."""
    group = next((each for each in name.split("=") if each.strip("^ ")), "")
    family, given, middle, prefix, suffix = [*map(str.strip, group.split("^")), "", "", "", "", ""][:5]
    return "^".join(map(escape, (family, given, middle, suffix, prefix))).rstrip("^")
