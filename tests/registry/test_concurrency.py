"""Many submissions at once, and a process that is killed among them: what was acknowledged is there, whole."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from tests.registry.samples import HOME, PATIENT, association, decoded, document, new_uid, submission
from xca_imaging import uids
from xca_imaging.errors import SubmissionRefused
from xca_imaging.metadata.model import Association, DocumentEntry, SubmissionSet
from xca_imaging.metadata.stored_query import FindDocuments, GetAll, StoredQuery
from xca_imaging.registry import Registry, Repository

THREADS = 8


def at_once(attempt: Callable[[int], str]) -> list[str]:
    """Run an attempt on every thread, all released at the same moment; return their results."""
    barrier = threading.Barrier(THREADS)

    def run(number: int) -> str:
        barrier.wait()
        return attempt(number)

    with ThreadPoolExecutor(THREADS) as pool:
        return sorted(pool.map(run, range(THREADS)))


def outcome(registry: Registry, *entries: DocumentEntry, **changes: str) -> str:
    try:
        registry.register(submission(*entries, **changes))
    except SubmissionRefused as refused:
        return ",".join(error.code for error in refused.errors)
    return "registered"


def test_concurrent_submissions_lose_nothing(registry: Registry) -> None:
    each = 12

    def attempt(_number: int) -> str:
        for _ in range(each):
            outcome(registry, document())
            registry.query(StoredQuery(FindDocuments(patient_id=PATIENT, status=(uids.APPROVED,))))
        return "done"

    assert at_once(attempt) == ["done"] * THREADS
    found = registry.query(StoredQuery(FindDocuments(patient_id=PATIENT, status=(uids.APPROVED,)), "ObjectRef"))
    assert len(found.refs) == len(set(found.refs)) == THREADS * each


def test_two_registries_on_one_file_lose_nothing(url: str) -> None:
    """As two processes would: no lock is shared but the file's."""
    registries = [Registry.open(url, home_community_id=HOME) for _ in range(2)]
    codes = at_once(lambda number: ",".join(outcome(registries[number % 2], document()) for _ in range(6)))
    assert codes == [",".join(["registered"] * 6)] * THREADS
    for registry in registries:
        registry.close()


def test_of_one_unique_id_with_different_content_only_one_is_registered(url: str) -> None:
    registries = [Registry.open(url, home_community_id=HOME) for _ in range(2)]
    entry = document()
    codes = at_once(lambda number: outcome(registries[number % 2], replace(entry, hash=f"{number:040x}", size=number)))
    assert codes == ["XDSNonIdenticalHash,XDSNonIdenticalSize"] * (THREADS - 1) + ["registered"]
    for registry in registries:
        registry.close()


def test_of_one_submission_set_only_one_is_registered(registry: Registry) -> None:
    used = new_uid()
    codes = at_once(lambda _: outcome(registry, document(), unique_id=used))
    assert codes == ["XDSDuplicateUniqueIdInRegistry"] * (THREADS - 1) + ["registered"]


def test_a_document_is_replaced_once(registry: Registry) -> None:
    entry = document()
    target = registry.register(submission(entry)).entry_uuids[entry.entry_uuid]

    def attempt(_number: int) -> str:
        new = document()
        try:
            registry.register(submission(new, associations=[association(uids.RPLC, new.entry_uuid, target)]))
        except SubmissionRefused as refused:
            return ",".join(error.code for error in refused.errors)
        return "registered"

    assert at_once(attempt) == ["XDSRegistryDeprecatedDocumentError"] * (THREADS - 1) + ["registered"]


# The process that is killed: registers and provides one document after the other, and says so when it may.
VICTIM = """
import sys
from pathlib import Path
from tests.registry.samples import HOME, REPOSITORY, document, submission
from xca_imaging.registry import Content, Registry, Repository

registry = Registry.open(sys.argv[1], home_community_id=HOME)
repository = Repository(registry, Path(sys.argv[2]), repository_unique_id=REPOSITORY)
number = 0
while True:
    number += 1
    entry = document(hash="", size=None, repository_unique_id="")
    repository.provide(submission(entry), {entry.entry_uuid: Content.of(b"%d" % number * 1000)})
    print(entry.unique_id, flush=True)
"""


@pytest.mark.parametrize(
    "acknowledged", [1, 7, 30, pytest.param(3000, marks=[pytest.mark.slow, pytest.mark.timeout(300)])]
)
def test_what_was_acknowledged_before_a_kill_is_whole(url: str, tmp_path: Path, acknowledged: int) -> None:
    folder = tmp_path / "documents"
    with subprocess.Popen(
        [sys.executable, "-c", VICTIM, url, str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
    ) as victim:
        assert victim.stdout is not None
        heard = [victim.stdout.readline().strip() for _ in range(acknowledged)]
        victim.send_signal(signal.SIGKILL)
        heard += [line.strip() for line in victim.stdout if line.endswith("\n")]
    assert "" not in heard

    registry = Registry.open(url, home_community_id=HOME, max_results=0)
    repository = Repository(registry, folder, repository_unique_id="1.3.6.1.4.1.21367.2017.1.2")
    approved = (uids.APPROVED,)
    query = GetAll(patient_id=PATIENT, document_status=approved, submission_set_status=approved, folder_status=approved)
    found = decoded(registry.query(StoredQuery(query)).fragments)
    entries = {item.unique_id: item for item in found if isinstance(item, DocumentEntry)}
    assert set(heard) <= set(entries)
    assert len(entries) - len(heard) in (0, 1)  # the one that was registered when its acknowledgement was lost
    for unique_id, entry in entries.items():  # also that one is whole
        stored = repository.find(unique_id)
        assert stored is not None
        assert (stored.sha1, stored.size) == (entry.hash, entry.size)
    sets = [item for item in found if isinstance(item, SubmissionSet)]
    members = [item for item in found if isinstance(item, Association)]
    assert len(sets) == len(members) == len(entries)
    registry.register(submission(document()))
    registry.close()


def test_a_thread_that_fails_leaves_the_turn_to_others(registry: Registry) -> None:
    with contextlib.suppress(RuntimeError), registry.database.writing():
        raise RuntimeError("a defect")
    assert outcome(registry, document()) == "registered"
