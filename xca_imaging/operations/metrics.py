"""Prometheus metrics of a node. No label ever holds a patient, study or instance identifier."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from xca_imaging.imaging.ledger import Summary


class Metrics:
    """Counters that the gateway raises and gauges that are read when asked for."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "xca_imaging_requests", "SOAP requests by outcome", ["transaction", "outcome"], registry=self._registry
        )
        self._instances = Counter(
            "xca_imaging_instances", "Instances asked for by RAD-69 and RAD-75", ["state"], registry=self._registry
        )
        self._spooled = Counter(
            "xca_imaging_instances_from_spool", "Instances held without asking a PACS", registry=self._registry
        )
        self._changed = Counter("xca_imaging_instances_changed", "Instances transcoded", registry=self._registry)
        self._brought = Counter(
            "xca_imaging_instances_brought", "Instances that PACSs sent, by method", ["method"], registry=self._registry
        )
        self._bytes = Counter("xca_imaging_held_bytes", "Bytes of all instances held", registry=self._registry)
        self._published = Counter(
            "xca_imaging_published",
            "Studies looked at for publishing, by what became of them",
            ["pacs", "outcome"],
            registry=self._registry,
        )
        self._sweeps = Counter(
            "xca_imaging_sweeps", "Sweeps of the PACSs, done or given up", ["pacs", "outcome"], registry=self._registry
        )
        self._swept = Gauge(
            "xca_imaging_last_sweep_seconds",
            "When the last sweep was done, since the epoch",
            ["pacs"],
            registry=self._registry,
        )

    def request(self, transaction: str, outcome: str) -> None:
        """One request ended: answered, refused (RegistryErrors only) or fault."""
        self._requests.labels(transaction, outcome).inc()

    def retrieval(self, summary: Summary) -> None:
        """One retrieval ended, and this is what its ledger says."""
        for state, count in (("held", summary.held), ("failed", summary.failed), ("given up", summary.open)):
            self._instances.labels(state).inc(count)
        self._spooled.inc(summary.cached)
        self._changed.inc(summary.changed)
        self._bytes.inc(summary.size)
        for method, count in summary.methods.items():
            self._brought.labels(method).inc(count)

    def published(self, pacs: str, outcome: str) -> None:
        """One study was registered, unchanged, replaced, withdrawn or refused."""
        self._published.labels(pacs, outcome).inc()

    def sweep(self, pacs: str, *, is_done: bool) -> None:
        """One sweep of a PACS ended, or was given up."""
        self._sweeps.labels(pacs, "done" if is_done else "failed").inc()
        if is_done:
            self._swept.labels(pacs).set_to_current_time()

    def watch(self, name: str, text: str, read: Callable[[], float]) -> None:
        """Expose a value that is read at each scrape."""
        Gauge(f"xca_imaging_{name}", text, registry=self._registry).set_function(read)

    def exposition(self) -> bytes:
        """Return all metrics in the Prometheus text format."""
        return generate_latest(self._registry)
