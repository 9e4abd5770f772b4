"""The Document Repository: what is stored, what is refused, what a failure leaves behind."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.registry.samples import PATIENT, REPOSITORY, decoded, document, new_uid, submission
from xca_imaging import errors, uids
from xca_imaging.errors import RegistryError, SubmissionRefused
from xca_imaging.metadata.model import DocumentEntry, Submission
from xca_imaging.metadata.stored_query import FindDocuments, StoredQuery
from xca_imaging.registry import Content, Registry, Repository, documents, submit

MANIFEST = b"\0" * 128 + b"DICM" + b"manifest " * 300


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "documents"


@pytest.fixture
def repository(registry: Registry, folder: Path) -> Repository:
    return Repository(registry, folder, repository_unique_id=REPOSITORY)


def provided(**changes: Any) -> DocumentEntry:
    """Return an entry as a Document Source sends it: the repository knows better where and how long it is."""
    return document(**{"hash": "", "size": None, "repository_unique_id": "", **changes})


def entries(registry: Registry) -> list[DocumentEntry]:
    found = registry.query(StoredQuery(FindDocuments(patient_id=PATIENT, status=(uids.APPROVED,))))
    return [item for item in decoded(found.fragments) if isinstance(item, DocumentEntry)]


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def refusal(repository: Repository, sent: Submission, contents: dict[str, Content]) -> list[RegistryError]:
    with pytest.raises(SubmissionRefused) as caught:
        repository.provide(sent, contents)
    return list(caught.value.errors)


def test_a_document_is_stored_and_registered_with_hash_size_and_repository(
    registry: Registry, repository: Repository, folder: Path
) -> None:
    entry = provided(repository_unique_id="1.2.3")  # overwritten: it is stored here
    registered = repository.provide(submission(entry), {entry.entry_uuid: Content.of(MANIFEST)})

    [found] = entries(registry)
    assert found.entry_uuid == registered.entry_uuids[entry.entry_uuid]
    assert (found.repository_unique_id, found.size) == (REPOSITORY, len(MANIFEST))
    assert found.hash == hashlib.sha1(MANIFEST).hexdigest()
    stored = repository.find(entry.unique_id)
    assert stored is not None
    assert stored.path.read_bytes() == MANIFEST
    assert (stored.size, stored.mime_type, stored.sha1) == (found.size, "application/dicom", found.hash)
    digest = hashlib.sha256(MANIFEST).hexdigest()
    assert files(folder) == [folder / digest[:2] / digest[2:4] / digest]
    assert stat.S_IMODE(stored.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_spooled_document_is_copied(repository: Repository, tmp_path: Path) -> None:
    spooled = tmp_path / "spooled"
    spooled.write_bytes(MANIFEST * 1000)  # more than one chunk
    sha1 = hashlib.sha1(MANIFEST * 1000).hexdigest()
    entry = provided(hash=sha1.upper(), size=len(MANIFEST) * 1000)
    content = Content(len(MANIFEST) * 1000, sha1, path=spooled)
    repository.provide(submission(entry), {entry.entry_uuid: content})
    stored = repository.find(entry.unique_id)
    assert stored is not None
    assert stored.path.read_bytes() == spooled.read_bytes()
    assert spooled.exists()


def test_an_empty_document_is_a_document(repository: Repository) -> None:
    entry = provided()
    repository.provide(submission(entry), {entry.entry_uuid: Content.of(b"")})
    stored = repository.find(entry.unique_id)
    assert stored is not None
    assert stored.sha1 == "da39a3ee5e6b4b0d3255bfef95601890afd80709"


def test_an_unknown_document_is_none(registry: Registry, repository: Repository, folder: Path) -> None:
    assert repository.find("1.2.3") is None
    entry = provided()
    repository.provide(submission(entry), {entry.entry_uuid: Content.of(MANIFEST)})
    other = Repository(registry, folder, repository_unique_id="1.2.3.4")
    assert other.find(entry.unique_id) is None


# --- Refusals ---------------------------------------------------------------------------------------------------------


def test_metadata_and_documents_must_come_together(registry: Registry, repository: Repository, folder: Path) -> None:
    first, second = provided(), provided()
    sent = submission(first, second)
    [error] = refusal(repository, sent, {first.entry_uuid: Content.of(MANIFEST)})
    assert error.code == "XDSMissingDocument"
    assert second.entry_uuid in error.context
    contents = {name: Content.of(MANIFEST) for name in (first.entry_uuid, second.entry_uuid, "Stray")}
    [error] = refusal(repository, sent, contents)
    assert error.code == "XDSMissingDocumentMetadata"
    assert "Stray" in error.context
    assert entries(registry) == []
    assert files(folder) == []


@pytest.mark.parametrize("changes", [{"hash": "0" * 40}, {"size": 1}])
def test_hash_and_size_of_the_metadata_must_be_those_of_the_document(
    repository: Repository, folder: Path, changes: dict[str, Any]
) -> None:
    entry = provided(**changes)
    [error] = refusal(repository, submission(entry), {entry.entry_uuid: Content.of(MANIFEST)})
    assert error.code == "XDSRepositoryMetadataError"
    assert files(folder) == []


def test_wrong_metadata_are_an_error_of_the_repository(repository: Repository) -> None:
    entry = provided(language_code="")
    [error] = refusal(repository, submission(entry), {entry.entry_uuid: Content.of(MANIFEST)})
    assert error.code == "XDSRepositoryMetadataError"


def test_an_on_demand_entry_has_no_document_to_provide(repository: Repository) -> None:
    entry = provided(object_type=uids.ON_DEMAND_DOCUMENT, creation_time="", repository_unique_id=REPOSITORY)
    [error] = refusal(repository, submission(entry), {entry.entry_uuid: Content.of(MANIFEST)})
    assert error.code == "XDSRepositoryMetadataError"


def test_what_the_registry_refuses_is_relayed_and_not_stored(
    registry: Registry, repository: Repository, folder: Path
) -> None:
    used = new_uid()
    registry.register(submission(document(), unique_id=used))
    entry = provided()
    [error] = refusal(repository, submission(entry, unique_id=used), {entry.entry_uuid: Content.of(MANIFEST)})
    assert error.code == "XDSDuplicateUniqueIdInRegistry"
    assert files(folder) == []
    assert repository.find(entry.unique_id) is None


def test_the_same_document_again_is_registered_and_stored_once(
    registry: Registry, repository: Repository, folder: Path
) -> None:
    entry = provided()
    for _ in range(2):
        repository.provide(submission(entry), {entry.entry_uuid: Content.of(MANIFEST)})
    twin = provided()  # other name, same content
    repository.provide(submission(twin), {twin.entry_uuid: Content.of(MANIFEST)})
    assert len(entries(registry)) == 3
    assert len(files(folder)) == 1
    assert repository.find(entry.unique_id) == repository.find(twin.unique_id)


def test_the_same_submission_again_is_refused_and_what_is_stored_stays(repository: Repository, folder: Path) -> None:
    entry = provided()
    sent, contents = submission(entry), {entry.entry_uuid: Content.of(MANIFEST)}
    repository.provide(sent, contents)
    [error] = refusal(repository, sent, contents)
    assert error.code == "XDSDuplicateUniqueIdInRegistry"
    assert repository.find(entry.unique_id) is not None
    assert len(files(folder)) == 1


def test_another_document_under_a_known_unique_id_is_refused(repository: Repository, folder: Path) -> None:
    entry = provided()
    repository.provide(submission(entry), {entry.entry_uuid: Content.of(MANIFEST)})
    for content, codes in (
        (MANIFEST[:-1] + b"!", ["XDSNonIdenticalHash"]),
        (MANIFEST + b"!", ["XDSNonIdenticalHash", "XDSNonIdenticalSize"]),
    ):
        found = refusal(repository, submission(entry), {entry.entry_uuid: Content.of(content)})
        assert [error.code for error in found] == codes
    stored = repository.find(entry.unique_id)
    assert stored is not None
    assert stored.path.read_bytes() == MANIFEST
    assert len(files(folder)) == 1


def test_a_collision_of_sha1_is_no_identical_document(
    registry: Registry, repository: Repository, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = provided()
    repository.provide(submission(entry), {entry.entry_uuid: Content.of(MANIFEST)})
    stage: Callable[..., documents.Staged] = documents.DocumentStore.stage

    def collide(store: documents.DocumentStore, content: Content) -> documents.Staged:
        return replace(stage(store, content), sha256="0" * 64)

    monkeypatch.setattr(documents.DocumentStore, "stage", collide)
    [error] = refusal(repository, submission(entry), {entry.entry_uuid: Content.of(MANIFEST)})
    assert (error.code, error.context) == ("XDSNonIdenticalHash", entry.unique_id)
    assert len(entries(registry)) == len(files(folder)) == 1


# --- Failures ---------------------------------------------------------------------------------------------------------


def test_a_failure_between_storing_and_committing_leaves_nothing(
    registry: Registry, repository: Repository, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = provided(), provided()
    sent = submission(first, second)
    contents = {first.entry_uuid: Content.of(MANIFEST), second.entry_uuid: Content.of(MANIFEST + b"2")}
    place: Callable[..., None] = documents.DocumentStore.place
    placed: list[documents.Staged] = []

    def fail_on_second(store: documents.DocumentStore, staged: documents.Staged) -> None:
        if placed:
            raise errors.RepositoryOutOfResources("the disk is full")
        placed.append(staged)
        place(store, staged)

    with monkeypatch.context() as patch:
        patch.setattr(documents.DocumentStore, "place", fail_on_second)
        with pytest.raises(errors.RepositoryOutOfResources):
            repository.provide(sent, contents)
    assert len(placed) == 1
    assert files(folder) == []
    assert entries(registry) == []
    repository.provide(sent, contents)
    assert len(files(folder)) == 2


def test_what_another_submission_stored_survives_a_failure(
    registry: Registry, repository: Repository, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry, twin = provided(), provided()
    repository.provide(submission(entry), {entry.entry_uuid: Content.of(MANIFEST)})

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(documents, "_sync", fail)  # another content is needed for a folder to be synced
        with pytest.raises(errors.RepositoryOutOfResources, match="No space left"):
            repository.provide(
                submission(twin, second := provided()),
                {twin.entry_uuid: Content.of(MANIFEST), second.entry_uuid: Content.of(MANIFEST + b"2")},
            )
    assert repository.find(entry.unique_id) is not None
    assert len(entries(registry)) == 1


def test_a_full_disk_while_staging_leaves_nothing(
    registry: Registry, repository: Repository, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = provided()

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(errors.RepositoryOutOfResources, match="No space left"):
            repository.provide(submission(entry), {entry.entry_uuid: Content.of(MANIFEST)})
    assert files(folder) == []
    assert entries(registry) == []


def test_a_spool_file_that_changed_is_not_stored(repository: Repository, folder: Path, tmp_path: Path) -> None:
    spooled = tmp_path / "spooled"
    spooled.write_bytes(MANIFEST)
    entry = provided()
    content = replace(Content.of(MANIFEST), data=None, path=spooled)
    spooled.write_bytes(MANIFEST[:-1])
    with pytest.raises(errors.RepositoryError, match="changed"):
        repository.provide(submission(entry), {entry.entry_uuid: content})
    assert files(folder) == []


def test_a_defect_while_registering_leaves_nothing(
    registry: Registry, repository: Repository, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = provided()

    def defect(*_: object) -> None:
        raise RuntimeError("a defect")

    with monkeypatch.context() as patch:
        patch.setattr(submit, "apply", defect)
        with pytest.raises(RuntimeError, match="a defect"):
            repository.provide(submission(entry), {entry.entry_uuid: Content.of(MANIFEST)})
    assert files(folder) == []
    assert entries(registry) == []


def test_what_cannot_be_undone_does_not_hide_the_failure(
    repository: Repository, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    entry = provided()

    def busy(*_: object) -> None:
        raise errors.RegistryBusy("the registry's database is locked")

    with monkeypatch.context() as patch:
        patch.setattr(documents, "_sync", busy)
        patch.setattr(documents.DocumentStore, "remove_unnamed", busy)
        with pytest.raises(errors.RegistryBusy):
            repository.provide(submission(entry), {entry.entry_uuid: Content.of(MANIFEST)})
    assert "stay on disk" in caplog.text
    assert repository.find(entry.unique_id) is None
    repository.provide(submission(entry), {entry.entry_uuid: Content.of(MANIFEST)})
    assert repository.find(entry.unique_id) is not None


@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_a_damaged_document_is_not_given_out_and_is_mended_by_sending_it_again(
    repository: Repository, damage: str
) -> None:
    entry = provided()
    repository.provide(submission(entry), {entry.entry_uuid: Content.of(MANIFEST)})
    stored = repository.find(entry.unique_id)
    assert stored is not None
    match damage:
        case "cut":
            stored.path.write_bytes(MANIFEST[:-1])
        case "changed":
            stored.path.write_bytes(MANIFEST[:-1] + b"!")
        case "gone":
            stored.path.unlink()
    with pytest.raises(errors.RepositoryError, match="damaged") as caught:
        repository.find(entry.unique_id)
    assert caught.value.location == entry.unique_id
    repository.provide(submission(entry), {entry.entry_uuid: Content.of(MANIFEST)})
    assert repository.find(entry.unique_id) == stored


def test_of_a_big_document_only_the_size_is_compared(registry: Registry, folder: Path) -> None:
    entry = provided()
    repository = Repository(registry, folder, repository_unique_id=REPOSITORY)
    repository.provide(submission(entry), {entry.entry_uuid: Content.of(MANIFEST)})
    store = documents.DocumentStore(folder, verify_up_to=len(MANIFEST) - 1)
    files(folder)[0].write_bytes(b"x" * len(MANIFEST))
    with registry.database.reading() as connection:
        assert store.find(connection, REPOSITORY, entry.unique_id) is not None


def test_what_a_crash_left_incoming_is_removed_when_it_is_old(registry: Registry, folder: Path) -> None:
    Repository(registry, folder, repository_unique_id=REPOSITORY)
    old, young = folder / "incoming" / "old", folder / "incoming" / "young"
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    Repository(registry, folder, repository_unique_id=REPOSITORY)
    assert files(folder) == [young]
