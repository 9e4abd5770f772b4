"""Documents in an object store: what is there, what a refusal leaves, what a loss looks like; and the orphan check."""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.registry.samples import REPOSITORY, new_uid, submission
from tests.registry.test_provide import MANIFEST, provided
from xca_imaging import errors
from xca_imaging.cli import check_config
from xca_imaging.errors import SubmissionRefused
from xca_imaging.gateway.documents import DocumentActors
from xca_imaging.registry import Content, Registry, Repository
from xca_imaging.registry.documents import DocumentStore, Orphans
from xca_imaging.registry.events import Requester
from xca_imaging.registry.remote import RemoteStore

DIGEST = hashlib.sha256(MANIFEST).hexdigest()
KEY = f"{DIGEST[:2]}/{DIGEST[2:4]}/{DIGEST}"


@pytest.fixture
def url(tmp_path: Path) -> str:
    """One database is enough here."""
    return f"sqlite:///{tmp_path / 'registry.db'}"


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """An S3 server in this process, with a bucket."""
    server_module = pytest.importorskip("moto.server", reason="needs moto[server]")
    boto3 = pytest.importorskip("boto3")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            patch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket="documents")
        yield "s3://documents"
    server.stop()


@pytest.fixture(params=["file", pytest.param("s3", marks=pytest.mark.slow)])
def remote(request: pytest.FixtureRequest, tmp_path: Path) -> RemoteStore:
    if request.param == "file":
        return RemoteStore(f"file://{tmp_path / 'remote'}")
    return RemoteStore(f"{request.getfixturevalue('s3')}/{new_uid()}")


@pytest.fixture
def repository(registry: Registry, tmp_path: Path, remote: RemoteStore) -> Repository:
    return Repository(registry, tmp_path / "cache", repository_unique_id=REPOSITORY, remote=remote)


def names(remote: RemoteStore) -> list[str]:
    return [name for name, _ in remote.names("")]


def forget_cache(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            path.unlink()


def test_a_document_is_there_and_comes_back_without_the_cache(
    repository: Repository, remote: RemoteStore, tmp_path: Path
) -> None:
    entry = provided()
    repository.provide(submission(entry), {entry.entry_uuid: Content.of(MANIFEST)})
    assert names(remote) == [DIGEST]
    assert remote.size(DIGEST) == len(MANIFEST)
    for _ in range(2):  # from the store, then from the cache
        found = repository.find(entry.unique_id)
        assert found is not None
        assert found.path.read_bytes() == MANIFEST
    forget_cache(tmp_path / "cache")
    found = repository.find(entry.unique_id)
    assert found is not None
    assert found.path.read_bytes() == MANIFEST
    assert list(repository.check())[-1] == Orphans(0, 0)


def test_a_refused_submission_leaves_nothing_there(repository: Repository, remote: RemoteStore, tmp_path: Path) -> None:
    kept = provided()
    sent = submission(kept)
    repository.provide(sent, {kept.entry_uuid: Content.of(MANIFEST)})
    other = provided(unique_id=kept.unique_id)
    with pytest.raises(SubmissionRefused, match="XDSNonIdenticalHash"):
        repository.provide(submission(other), {other.entry_uuid: Content.of(b"something else")})
    with pytest.raises(SubmissionRefused, match="XDSDuplicateUniqueIdInRegistry"):  # same content, which has a name
        repository.provide(sent, {kept.entry_uuid: Content.of(MANIFEST)})
    assert names(remote) == [DIGEST]
    assert not list((tmp_path / "cache" / "incoming").iterdir())


def test_a_removed_document_is_gone_there(repository: Repository, remote: RemoteStore) -> None:
    entry, twin = provided(), provided()
    for each in (entry, twin):
        repository.provide(submission(each), {each.entry_uuid: Content.of(MANIFEST)})
    repository.remove(entry.unique_id, Requester("test"))
    assert names(remote) == [DIGEST]
    repository.remove(twin.unique_id, Requester("test"))
    assert names(remote) == []


def test_what_was_removed_between_staging_and_placing_is_sent_again(
    registry: Registry, remote: RemoteStore, tmp_path: Path
) -> None:
    store = DocumentStore(tmp_path / "cache", remote=remote)
    staged = store.stage(Content.of(MANIFEST))
    remote.remove(DIGEST)
    store.place(staged)
    assert names(remote) == [DIGEST]


def test_a_loss_there_is_told(repository: Repository, remote: RemoteStore, tmp_path: Path) -> None:
    entry = provided()
    repository.provide(submission(entry), {entry.entry_uuid: Content.of(MANIFEST)})
    forget_cache(tmp_path / "cache")
    remote.remove(DIGEST)
    with pytest.raises(errors.RepositoryError, match="missing or damaged"):
        repository.find(entry.unique_id)
    assert list(repository.check())[-1] == Orphans(0, 1)
    damaged = tmp_path / "damaged"
    damaged.write_bytes(MANIFEST.replace(b"manifest", b"MANIFEST"))
    remote.put(damaged, DIGEST)
    with pytest.raises(errors.RepositoryError, match="missing or damaged"):
        repository.find(entry.unique_id)


def test_the_cache_is_bounded(registry: Registry, remote: RemoteStore, tmp_path: Path) -> None:
    store = DocumentStore(tmp_path / "cache", remote=remote, cache_bytes=3000)
    for number in range(5):
        store.place(store.stage(Content.of(bytes([number]) * 1000)))
    files = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert sorted(path.read_bytes()[0] for path in files) == [2, 3, 4]
    assert len(names(remote)) == 5


def test_a_store_that_does_not_answer_refuses_and_leaves_nothing(registry: Registry, tmp_path: Path) -> None:
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where a folder should be")
    repository = Repository(
        registry, tmp_path / "cache", repository_unique_id=REPOSITORY, remote=RemoteStore(f"file://{blocked}")
    )
    entry = provided()
    with pytest.raises(errors.RepositoryBusy):
        repository.provide(submission(entry), {entry.entry_uuid: Content.of(MANIFEST)})
    assert not list((tmp_path / "cache" / "incoming").iterdir())
    assert repository.find(entry.unique_id) is None


@pytest.mark.parametrize("url", ["nothing://bucket/prefix"])
def test_an_unknown_kind_of_store_is_a_wrong_setting(url: str) -> None:
    with pytest.raises(errors.ConfigurationError, match=r"repository\.store"):
        RemoteStore(url)


def test_check_config_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "node.toml"
    text = '[node]\nhome_community_id = "urn:oid:1.2.3"\n[repository]\nunique_id = "1.2.3.4"\nstore = "{}"\n'
    file.write_text(text.format("nothing://bucket"))
    assert check_config.run(argparse.Namespace(config=file)) == 2
    assert "repository.store" in capsys.readouterr().err
    file.write_text(text.format(f"file://{tmp_path / 'remote'}"))
    assert check_config.run(argparse.Namespace(config=file)) == 0


# --- The check of a store on disk -------------------------------------------------------------------------------------


async def test_the_check_counts_old_contents_without_name_and_names_without_content(
    registry: Registry, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xca_imaging.gateway.documents._CHECK_PAUSE", 0.0)
    folder = tmp_path / "documents"
    repository = Repository(registry, folder, repository_unique_id=REPOSITORY)
    kept, lost = provided(), provided()
    for entry, content in ((kept, MANIFEST), (lost, b"lost")):
        repository.provide(submission(entry), {entry.entry_uuid: Content.of(content)})
    with ThreadPoolExecutor(1) as executor:
        actors = DocumentActors(registry, repository, executor)
        await actors.check_store()
        assert actors.orphans == Orphans(0, 0)
        assert caplog.records == []
        digest = hashlib.sha256(b"lost").hexdigest()
        (folder / digest[:2] / digest[2:4] / digest).unlink()
        for age, name in ((0.0, "ab" + "0" * 62), (100_000.0, "ab" + "1" * 62)):  # one may still be registered
            path = folder / "ab" / name[2:4] / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"left over")
            os.utime(path, (time.time() - age,) * 2)
        await actors.check_store()
    assert actors.orphans == Orphans(1, 1)
    assert [record.levelname for record in caplog.records] == ["ERROR", "WARNING"]
