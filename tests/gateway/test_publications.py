"""The memory of what was published: kept over restarts, shared by processes, replaced when damaged."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from xca_imaging.errors import ConfigurationError
from xca_imaging.gateway.publications import Publications, Sent, StudyRecord
from xca_imaging.metadata.model import DocumentEntry

RECORD = StudyRecord(
    pacs="main",
    study_instance_uid="1.2.3",
    day="20260304",
    patient_id="P^^^&1.2&ISO",
    given_for="D^^^1.3",
    seen="a",
    published="b",
    series="c",
    looked_at=1.5,
    missing=1,
)
STUDY_REFERENCE = "1.2.3^^^^urn:ihe:iti:xds:2016:studyInstanceUID"


def test_studies_are_remembered_over_a_restart(tmp_path: Path) -> None:
    first = Publications(tmp_path)
    assert first.study("main", "1.2.3") == StudyRecord(pacs="main", study_instance_uid="1.2.3")
    first.remember(RECORD)
    first.remember(replace(RECORD, missing=2))
    first.remember(replace(RECORD, study_instance_uid="1.2.4", day="20260401"))
    first.remember(replace(RECORD, pacs="other"))
    first.close()
    second = Publications(tmp_path)
    assert second.study("main", "1.2.3") == replace(RECORD, missing=2)
    assert second.studies("main", "20260304", "20260331") == {"1.2.3": replace(RECORD, missing=2)}
    assert set(second.studies("main", "20260304", "20260401")) == {"1.2.3", "1.2.4"}
    second.forget("main", "1.2.3")
    assert second.study("main", "1.2.3").day == ""
    assert second.study("other", "1.2.3").day == "20260304"
    second.close()


def test_two_processes_see_what_the_other_writes(tmp_path: Path) -> None:
    first, second = Publications(tmp_path), Publications(tmp_path)
    first.remember(RECORD)
    assert second.study("main", "1.2.3") == RECORD
    first.close()
    second.close()


def test_a_damaged_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "publishing").mkdir()
    (tmp_path / "publishing" / "memory.db").write_bytes(b"no database at all" * 500)
    memory = Publications(tmp_path)
    memory.remember(RECORD)
    assert memory.study("main", "1.2.3") == RECORD
    memory.close()


def test_a_folder_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    (tmp_path / "publishing").write_text("a file")
    with pytest.raises(ConfigurationError, match="publishing"):
        Publications(tmp_path)


def test_what_went_elsewhere_is_kept_until_it_is_replaced(tmp_path: Path) -> None:
    memory = Publications(tmp_path)
    entry = replace(
        DocumentEntry(entry_uuid="", unique_id="1.2.9", patient_id="P^^^&1.2&ISO", mime_type="application/dicom"),
        entry_uuid="urn:uuid:00000000-0000-4000-8000-000000000001",
        reference_ids=(STUDY_REFERENCE,),
    )
    memory.keep_sent("https://a/", [Sent(entry, b"one")], [])
    assert memory.sent("https://a/", STUDY_REFERENCE) == [entry]
    assert list(memory.all_sent("https://a/")) == [(entry, b"one")]
    assert memory.sent_content("https://a/", entry.unique_id) == b"one"
    assert memory.sent_content("https://b/", entry.unique_id) is None
    assert memory.sent("https://b/", STUDY_REFERENCE) == list(memory.all_sent("https://b/")) == []
    assert memory.sent("https://a/", STUDY_REFERENCE.replace("1.2.3", "1.2.4")) == []
    newer = replace(entry, entry_uuid="urn:uuid:00000000-0000-4000-8000-000000000002", unique_id="1.2.10")
    memory.keep_sent("https://a/", [Sent(newer, b"two")], [entry.entry_uuid])
    assert memory.sent("https://a/", STUDY_REFERENCE) == [newer]
    assert memory.sent_content("https://a/", entry.unique_id) is None
    memory.close()


def test_all_that_went_elsewhere_is_read_by_pages(tmp_path: Path) -> None:
    memory = Publications(tmp_path)
    entries = [
        DocumentEntry(
            entry_uuid=f"urn:uuid:00000000-0000-4000-8000-{number:012}",
            unique_id=f"1.2.{number}",
            patient_id="P^^^&1.2&ISO",
            reference_ids=(STUDY_REFERENCE,),
        )
        for number in range(250)
    ]
    memory.keep_sent("https://a/", [Sent(entry, b"x") for entry in entries], [])
    assert [entry for entry, _ in memory.all_sent("https://a/")] == entries
    memory.close()


def test_one_process_sweeps(tmp_path: Path) -> None:
    first, second = Publications(tmp_path), Publications(tmp_path)
    assert first.may_sweep()
    assert first.may_sweep()
    assert not second.may_sweep()
    first.close()
    assert second.may_sweep()
    second.close()


async def test_one_publishes_a_study(tmp_path: Path) -> None:
    first, second = Publications(tmp_path), Publications(tmp_path)
    order = []

    async def wait() -> None:
        async with second.publishing("main", "1.2.3"):
            order.append("second")

    async with first.publishing("main", "1.2.3"):
        waiting = asyncio.create_task(wait())
        await asyncio.sleep(0.15)
        order.append("first")
        waiting_cancelled = asyncio.create_task(wait())
        await asyncio.sleep(0.01)
        waiting_cancelled.cancel()
    await waiting
    assert order == ["first", "second"]
    async with first.publishing("main", "1.2.3"):
        pass
    first.close()
    second.close()
