"""Made-up studies, as a PACS would tell of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from xca_imaging.imaging.study import (
    ImagingRequest,
    InstanceFacts,
    Patient,
    SeriesContents,
    SeriesFacts,
    StudyContents,
    StudyFacts,
)
from xca_imaging.metadata.model import Code

STUDY = "1.2.826.0.1.3680043.8.498.1"
AUTHORITY = "1.3.6.1.4.1.21367.2005.13.20.1000"
CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2"
SR_DOCUMENT = "1.2.840.10008.5.1.4.1.1.88.11"

PATIENT = Patient(id="DEPT-1", name="Muster^Erika^M^Dr.^jr.", birth_date="19700131", sex="F")


def series(number: int = 1, count: int = 2, *, sop_class: str = CT_IMAGE, **facts: Any) -> SeriesContents:
    uid = f"{STUDY}.{number}"
    return SeriesContents(
        SeriesFacts(series_instance_uid=uid, **({"modality": "CT"} | facts)),
        tuple(InstanceFacts(sop_instance_uid=f"{uid}.{n}", sop_class_uid=sop_class) for n in range(1, count + 1)),
    )


def study(*all_series: SeriesContents, **facts: Any) -> StudyContents:
    known: dict[str, Any] = {
        "patient": PATIENT,
        "date": "20260102",
        "time": "143000",
        "description": "CT Thorax",
        "accession_number": "ACC-1",
    }
    return StudyContents(StudyFacts(study_instance_uid=STUDY, **(known | facts)), all_series or (series(),))


def full_study() -> StudyContents:
    """Every attribute that is carried on, with text beyond ASCII."""
    request = ImagingRequest(
        accession_number="ACC-2",
        accession_issuer="1.2.3.2",
        placer_order_number="PLACER-2",
        placer_issuer="1.2.3.3",
        filler_order_number="FILLER-2",
        requested_procedure_id="RP-2",
        requested_procedure_description="Untersuchung des Brustkorbs – 胸部",
    )
    return study(
        series(1, 3, body_part_examined="CHEST", requests=(request,), institution_name="Klinik & Praxis"),
        series(2, 1, modality="SR", sop_class=SR_DOCUMENT),
        patient=Patient(
            id="DEPT-1",
            issuer="HOSPITAL",
            issuer_oid="1.2.3.1",
            name="Yamada^Tarou=山田^太郎=やまだ^たろう",
            birth_date="19700131",
            sex="M",
        ),
        timezone_offset="+0900",
        description="Röntgen – 胸部",
        id="S1",
        accession_issuer="1.2.3.2",
        referring_physician="Øvrig^Lege",
        procedure_codes=(Code("24627-2", "LN", "CT Chest"),),
    )


def uid_factory(prefix: str = "1.2.826.0.1.3680043.9") -> Callable[[], str]:
    """Return a factory of UIDs that counts."""
    numbers = iter(range(1, 1_000_000))
    return lambda: f"{prefix}.{next(numbers)}"


def uuid_factory() -> Callable[[], str]:
    """Return a factory of entryUUIDs that counts."""
    numbers = iter(range(1, 1_000_000))
    return lambda: f"urn:uuid:00000000-0000-4000-8000-{next(numbers):012x}"
