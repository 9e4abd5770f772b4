"""Speed of the registry: queries and registrations beside a growing number of documents, and a long answer.

    python -m tests.bench.bench_registry [--documents N] [--url URL] [--json FILE]

The registry is filled through its own code path (validation, checks, tables, indexes), ten documents a patient in one
submission; only waiting for the disk is left out while it is filled. Times of queries are in process, with the XML of
all that is found. Registrations are single submissions of one document each, durable when they return. The long
answer is taken from a node over HTTP: from the last byte of the request to the first of the body of the answer.

BENCH_FULL=1 measures 2 000 000 documents, on SQLite and on PostgreSQL.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from lxml import etree

from tests.registry import postgresql
from tests.registry.samples import HOME, KOS, code, document, new_uid, study_reference, submission
from tests.support.node import Node
from xca_imaging import uids
from xca_imaging.metadata.model import Author, Code, Submission
from xca_imaging.metadata.stored_query import FindDocuments, StoredQuery
from xca_imaging.registry import Registry
from xca_imaging.transactions import iti18
from xca_imaging.wire import soap

PER_PATIENT = 10
SMALL = 20_000
LONG = 5000  # documents of the one patient with a long history
AUTHORITY = "1.3.6.1.4.1.21367.2005.13.20.1000"
LONG_PATIENT = f"long^^^&{AUTHORITY}&ISO"

MEDIAN, P99, GROWTH, REGISTRATIONS, FIRST_BYTE = 5.0, 20.0, 1.5, 300.0, 100.0  # ms, ms, times, per second, ms


def patient(number: int) -> str:
    return f"P{number:07}^^^&{AUTHORITY}&ISO"


def study(patient_number: int, number: int) -> str:
    return f"1.2.826.0.1.3680043.8.498.{patient_number + 1}.{number + 1}"


def manifests(patient_id: str, references: list[str]) -> Submission:
    """Return a submission of imaging manifests as `publish` makes them, one for each study."""
    entries = [
        document(
            patient_id=patient_id,
            title="CT thorax with contrast",
            event_codes=(Code("CT", uids.DICOM_CONTROLLED_TERMINOLOGY, "Computed Tomography"), code("thorax")),
            authors=(Author(institutions=("West General",), person="^Writer^Ada^^^"),),
            source_patient_info=("PID-3|L-0001^^^&1.3.6.1.4.1.21367.2017.6&ISO", "PID-5|Doe^Jane", "PID-8|F"),
            service_start_time="20240228101500",
            reference_ids=(reference, f"A{new_uid()[5:20]}^^^&1.2.3.4&ISO^{uids.REFERENCE_ACCESSION}"),
        )
        for reference in references
    ]
    return submission(*entries, patient_id=patient_id)


def fill(registry: Registry, first: int, last: int) -> None:
    """Register the documents of some patients."""
    with registry.database.reading() as connection:
        # The pool hands the same connection to a caller who uses one at a time.
        off = ["COMMIT", "PRAGMA synchronous = OFF", "BEGIN"]  # SQLite takes it outside of a transaction only
        for statement in off if connection.dialect.name == "sqlite" else ["SET synchronous_commit = off"]:
            connection.exec_driver_sql(statement)
    for each in range(first, last):
        references = [study_reference(study(each, number)) for number in range(PER_PATIENT)]
        registry.register(manifests(patient(each), references))


@dataclass
class Times:
    """Times of many calls in ms."""

    median: float
    p99: float

    @classmethod
    def of(cls, calls: Iterator[Callable[[], Any]]) -> Times:
        taken = []
        for call in calls:
            started = time.perf_counter()
            call()
            taken.append((time.perf_counter() - started) * 1000)
        taken.sort()
        return cls(statistics.median(taken), taken[int(len(taken) * 0.99)])


def queries(registry: Registry, patients: int, rounds: int) -> dict[str, Times]:
    """Time FindDocuments and FindDocumentsByReferenceId of random patients, answers read to the end."""
    chance = random.Random(7)

    def find(**asked: Any) -> Callable[[], Any]:
        query = StoredQuery(FindDocuments(status=(uids.APPROVED,), format_codes=(KOS,), **asked))

        def call() -> None:
            found = sum(map(len, registry.query(query).pages()))
            assert found == (1 if "reference_ids" in asked else PER_PATIENT), found

        return call

    def by_patient() -> Iterator[Callable[[], Any]]:
        for _ in range(rounds):
            yield find(patient_id=patient(chance.randrange(patients)))

    def by_reference() -> Iterator[Callable[[], Any]]:
        for _ in range(rounds):
            number = chance.randrange(patients)
            reference = study_reference(study(number, chance.randrange(PER_PATIENT)))
            yield find(patient_id=patient(number), reference_ids=((reference,),))

    return {"FindDocuments": Times.of(by_patient()), "FindDocumentsByReferenceId": Times.of(by_reference())}


def registrations(registry: Registry, patients: int, seconds: float = 3.0) -> float:
    """Return single-entry submissions a second, each durable."""
    chance = random.Random(8)
    prepared = [manifests(patient(chance.randrange(patients)), [study_reference(new_uid())]) for _ in range(3000)]
    started, count = time.perf_counter(), 0
    count = 0
    for each in prepared:
        registry.register(each)
        count += 1
        if time.perf_counter() - started > seconds:
            break
    return count / (time.perf_counter() - started)


def long_answer(url: str, workspace: Path) -> tuple[float, float, float]:
    """Return ms to the first byte, ms to the last, and MB of an answer with `LONG` entries, the best of three."""
    node = Node(workspace / "node", {"database": {"url": url}, "node": {"home_community_id": HOME}})
    query = StoredQuery(FindDocuments(patient_id=LONG_PATIENT, status=(uids.APPROVED,)))
    action = etree.Element("{http://www.w3.org/2005/08/addressing}Action")
    action.text = uids.ITI18_REQUEST
    message_id = etree.Element("{http://www.w3.org/2005/08/addressing}MessageID")
    message_id.text = "urn:uuid:00000000-0000-4000-8000-000000000000"
    message = soap.write_envelope([action, message_id], iti18.encode_request(query))
    best = (float("inf"), 0.0, 0.0)
    with node:
        for _ in range(3):
            connection = HTTPConnection("127.0.0.1", node.http_port, timeout=60)
            headers = {"Content-Type": "application/soap+xml; charset=UTF-8"}
            connection.connect()
            started = time.perf_counter()
            connection.request("POST", "/services/registry", message, headers)
            response = connection.getresponse()
            body = response.read(1)
            first = time.perf_counter() - started
            body += response.read()
            last = time.perf_counter() - started
            connection.close()
            assert body.count(b"<rim:ExtrinsicObject ") == LONG
            best = min(best, (first * 1000, last * 1000, len(body) / 1e6))
    return best


def measure(url: str, documents: int, workspace: Path) -> dict[str, float]:
    """Fill a registry in two steps and measure it at each."""
    figures: dict[str, float] = {"documents": documents}
    registry = Registry.open(url, home_community_id=HOME, max_results=0)
    steps = {"small": SMALL // PER_PATIENT, "large": documents // PER_PATIENT}
    done = 0
    for step, patients in steps.items():
        started = time.perf_counter()
        fill(registry, done, patients)
        figures[f"{step}_filled_per_s"] = (patients - done) * PER_PATIENT / (time.perf_counter() - started)
        done = patients
        queries(registry, patients, 50)  # statements are compiled, pages read
        for name, times in queries(registry, patients, 2000).items():
            figures[f"{step}_{name}_median_ms"], figures[f"{step}_{name}_p99_ms"] = times.median, times.p99
    for name in ("FindDocuments", "FindDocumentsByReferenceId"):
        figures[f"{name}_growth"] = figures[f"large_{name}_median_ms"] / figures[f"small_{name}_median_ms"]
    batch = manifests(LONG_PATIENT, [study_reference(new_uid()) for _ in range(LONG)])
    started = time.perf_counter()
    registry.register(batch)
    figures["batch_per_s"] = LONG / (time.perf_counter() - started)
    registry.close()
    registry = Registry.open(url, home_community_id=HOME)  # with durability on
    figures["registrations_per_s"] = registrations(registry, done)
    registry.close()
    first, last, megabytes = long_answer(url, workspace)
    figures |= {"long_first_byte_ms": first, "long_last_byte_ms": last, "long_mb": megabytes}
    return figures


def check(figures: dict[str, float]) -> list[str]:
    """Return what does not hold."""
    missed = []
    for name in ("FindDocuments", "FindDocumentsByReferenceId"):
        missed += [f"{name} median"] if figures[f"large_{name}_median_ms"] > MEDIAN else []
        missed += [f"{name} p99"] if figures[f"large_{name}_p99_ms"] > P99 else []
        missed += [f"{name} growth"] if figures[f"{name}_growth"] > GROWTH else []
    missed += ["registrations"] if figures["registrations_per_s"] < REGISTRATIONS else []
    missed += ["first byte"] if figures["long_first_byte_ms"] > FIRST_BYTE else []
    return missed


def print_table(name: str, figures: dict[str, float]) -> None:
    print(f"\nregistry on {name}, {figures['documents']:,.0f} documents")
    for step, count in (("small", SMALL), ("large", figures["documents"])):
        for query in ("FindDocuments", "FindDocumentsByReferenceId"):
            median, p99 = figures[f"{step}_{query}_median_ms"], figures[f"{step}_{query}_p99_ms"]
            print(f"  {query:<28}{count:>12,.0f} documents   median {median:6.2f} ms   p99 {p99:6.2f} ms")
    for query in ("FindDocuments", "FindDocumentsByReferenceId"):
        print(f"  {query:<28}{'':>12} growth      {figures[f'{query}_growth']:6.2f} times")
    print(f"  {'submissions, one document':<28}{figures['registrations_per_s']:>12,.0f} /s, durable")
    print(f"  {'submissions, ten documents':<28}{figures['large_filled_per_s']:>12,.0f} documents/s, not synced")
    print(f"  {f'one submission of {LONG}':<28}{figures['batch_per_s']:>12,.0f} documents/s")
    print(
        f"  {f'answer of {LONG} entries':<28}{figures['long_mb']:>12,.0f} MB"
        f"          first byte {figures['long_first_byte_ms']:.0f} ms   last {figures['long_last_byte_ms']:.0f} ms"
    )


def main(arguments: list[str] | None = None) -> int:
    full = os.environ.get("BENCH_FULL") == "1"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=2_000_000 if full else 200_000)
    parser.add_argument("--url", help="of an empty database; without it SQLite, with BENCH_FULL=1 PostgreSQL too")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args(arguments)
    results: dict[str, dict[str, float]] = {}
    missed: list[str] = []
    with ExitStack() as stack:
        workspace = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-registry-")))
        databases = {"SQLite": f"sqlite:///{workspace / 'registry.db'}"}
        if chosen.url:
            databases = {"the given database": chosen.url}
        elif full:
            server = stack.enter_context(postgresql.serve(settings=""))
            databases["PostgreSQL"] = stack.enter_context(postgresql.database(server))
        for name, url in databases.items():
            results[name] = measure(url, chosen.documents, workspace / name)
            print_table(name, results[name])
            missed += [f"{name}: {each}" for each in check(results[name])]
    for each in missed:
        print(f"  missed: {each}")
    if chosen.json:
        chosen.json.write_text(json.dumps(results, indent=1))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
