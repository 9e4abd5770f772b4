"""One retrieval as its consumer sees it: what comes is written, checked and put in its place, and the ledger told.

References
----------
* IHE RAD TF-2, 4.69.4.2.3, 4.75 (an error, or a warning, by document)
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from xca_imaging.errors import OutputError, RegistryError
from xca_imaging.gateway.peers import PartSink
from xca_imaging.gateway.receipt import TRANSCODED, NotReceived, Receipt
from xca_imaging.imaging import part10
from xca_imaging.imaging.ledger import State, Want
from xca_imaging.transactions.document_set import DocumentResponse, RetrieveResponse
from xca_imaging.wire import mtom

log = logging.getLogger(__name__)

_UID = re.compile(r"[0-9]+(?:\.[0-9]+)*")


class Progress:
    """What a retrieval tells while it runs; the default says nothing."""

    def expect(self, instances: int) -> None:
        """So many instances are wanted."""

    def received(self, size: int) -> None:
        """So many more bytes have come."""

    def arrived(self) -> None:
        """One more instance is whole."""


class FileSink:
    """Writes one attachment to a file of its own, hashing what passes. Every method raises OutputError."""

    def __init__(self, folder: Path, progress: Progress) -> None:
        self.path = folder / f"{uuid.uuid4().hex}.part"
        self.size = 0
        self.whole = False
        self._hash = hashlib.sha256()
        self._progress = progress
        with _writing(self.path):
            # Unbuffered: what cannot be written is known at once, and the pieces are large.
            self._file = self.path.open("wb", buffering=0)

    def write(self, data: memoryview) -> None:
        rest = data
        with _writing(self.path):
            while rest:
                rest = rest[self._file.write(rest) :]
        self._hash.update(data)
        self.size += len(data)
        self._progress.received(len(data))

    def finish(self) -> None:
        with _writing(self.path):
            self._file.close()
        self.whole = True
        self._progress.arrived()

    def abandon(self) -> None:
        with _writing(self.path):
            self._file.close()
            self.path.unlink(missing_ok=True)

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()


class Retrieval:
    """What comes for a receipt; use as a context manager, which ends with every wanted instance held or failed.

    Parameters
    ----------
    receipt : Receipt
        With the ledger of what is wanted.
    out : Path
        Instances become `out/<study>/<series>/<instance>.dcm`.
    accept : sequence of str
        Transfer syntaxes that are asked for: in no other is an instance taken.
    """

    # Mutable state: how often each want was asked for (_attempts), why it did not come so far (_reasons), and the files
    # of the answer that is being read, by content id (_sinks).

    def __init__(self, receipt: Receipt, out: Path, accept: Sequence[str], progress: Progress) -> None:
        self.receipt, self.accept = receipt, tuple(accept)
        self._out, self._incoming, self._progress = out, out / ".incoming", progress
        self._attempts: Counter[Want] = Counter()
        self._reasons: dict[Want, RegistryError] = {}
        self._sinks: dict[str, FileSink] = {}

    def __enter__(self) -> Self:
        with _writing(self._incoming):
            self._incoming.mkdir(parents=True, exist_ok=True)
        self._progress.expect(len(self.receipt.ledger))
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._incoming, ignore_errors=True)
        for want in self.missing():
            error = self._reasons.get(want) or NotReceived("never arrived")
            self.receipt.ledger.fail(want, error, attempts=self._attempts[want])

    def missing(self) -> list[Want]:
        """Return what is not held, in the order of the manifests."""
        return [entry.want for entry in self.receipt.ledger if entry.state is State.MISSING]

    def begin(self, wants: Iterable[Want]) -> None:
        """Learn that these are asked for (again)."""
        self._sinks.clear()
        for want in wants:
            self._attempts[want] += 1
            self._reasons.pop(want, None)

    def blame(self, wants: Iterable[Want], reason: str) -> None:
        """Say why these did not come, those that did left aside."""
        for want in wants:
            if self.receipt.ledger[want].state is State.MISSING:
                self._reasons[want] = NotReceived(reason)

    def sink(self, content_id: str, content_type: str) -> PartSink:
        """Return where an attachment of the current answer goes."""
        made = self._sinks[content_id] = FileSink(self._incoming, self._progress)
        return made

    def settle(self, responses: Iterable[RetrieveResponse], wants: Sequence[Want]) -> None:
        """Take over what an answer brought, whole or not.

        Raises
        ------
        OutputError
        """
        for response in responses:
            self._settle(response, wants)
        for content_id, left in self._sinks.items():
            if left.whole and left.path.exists():
                self.receipt.unexpected.append(f"attachment {content_id}")
                left.path.unlink()

    def _settle(self, response: RetrieveResponse, wants: Sequence[Want]) -> None:
        said = [(error, set(_UID.findall(f"{error.location} {error.context}"))) for error in response.registry.errors]
        changed = set().union(*(named for error, named in said if error.warning and TRANSCODED in error.context))
        by_id = {(want.repository_unique_id, want.sop_instance_uid): want for want in wants}
        for document in response.documents:
            want = by_id.get((document.repository_unique_id, document.document_unique_id))
            if want is None or self.receipt.ledger[want].state is State.HELD:
                self.receipt.unexpected.append(document.document_unique_id)
                continue
            try:
                self._keep(document, want, bytes_changed=want.sop_instance_uid in changed)
            except part10.Part10Error as exc:
                self._reasons[want] = NotReceived(str(exc))
        missing = [want for want in wants if self.receipt.ledger[want].state is State.MISSING]
        for error, named in said:
            # RAD-69 wants the document in `location`, RAD-75 the gateway: then it stands in `codeContext`.
            self._reasons.update((want, error) for want in missing if want.sop_instance_uid in named)
        general = [error for error in response.registry.errors if not error.warning]
        if len(general) == 1:
            for want in missing:
                self._reasons.setdefault(want, general[0])

    def _keep(self, document: DocumentResponse, want: Want, *, bytes_changed: bool) -> None:
        """Check one instance and move it to its place.

        Raises
        ------
        part10.Part10Error
            It is not what was asked for, or not whole.
        OutputError
        """
        content = document.content
        if isinstance(content, mtom.Reference):
            sink = self._sinks.get(content.content_id)
            if sink is None or not sink.whole:
                raise part10.Part10Error("the answer names an attachment that did not come whole")
        else:
            sink = FileSink(self._incoming, Progress())
            sink.write(memoryview(content))
            sink.finish()
        facts = part10.identify(sink.path)
        asked = (want.study_instance_uid, want.series_instance_uid, want.sop_instance_uid)
        if (facts.study_instance_uid, facts.series_instance_uid, facts.sop_instance_uid) != asked:
            raise part10.Part10Error(
                f"another instance came: {facts.sop_instance_uid} of series {facts.series_instance_uid}"
            )
        if facts.transfer_syntax_uid not in self.accept:
            raise part10.Part10Error(f"it came in transfer syntax {facts.transfer_syntax_uid}, which was not asked for")
        try:
            part10.verify_whole(sink.path, facts.transfer_syntax_uid)
        except part10.Truncated:
            raise
        except part10.Part10Error as exc:
            log.warning("%s is kept as it came: %s", want.sop_instance_uid, exc)
        target = self._out / want.study_instance_uid / want.series_instance_uid / f"{want.sop_instance_uid}.dcm"
        with _writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(sink.path, target)
        self.receipt.ledger.hold(
            want,
            size=sink.size,
            transfer_syntax_uid=facts.transfer_syntax_uid,
            attempts=self._attempts[want],
            bytes_changed=bytes_changed,
            sha256=sink.sha256,
        )


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise OutputError(f"{path} cannot be written: {exc.strerror or exc}") from exc
