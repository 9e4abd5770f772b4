"""A whole instance in the spool: what it is, where it belongs, and who holds it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from xca_imaging.imaging.spool import Spool


class SpooledInstance:
    """A whole instance on disk.

    Attributes
    ----------
    name : str
        Of the file in the spool's folder.
    size : int
        Of the file, File Meta Information included.
    checksum : str
        XXH3-128 of the file, in hexadecimal.
    sha256 : str or None
        Of the file, in hexadecimal; None until it has been computed.
    study_instance_uid, series_instance_uid, source : str
        Where it belongs and the name of the PACS that it came from; empty until `place` is called.
    accept : frozenset of str
        The transfer syntaxes that its PACS could choose from when it was sent.
    bytes_changed : bool
        It was transcoded here.
    """

    # Mutable state: what `place` and `keep_sha256` set, how many hold it (_holders), when the last of them let go
    # (_idle_since), whether the spool has replaced or evicted it (_is_indexed is False then: the last release removes
    # the file), and whether it is trusted (_is_verified: all that this run wrote is).
    __slots__ = (
        "_holders",
        "_idle_since",
        "_is_indexed",
        "_is_verified",
        "_spool",
        "accept",
        "bytes_changed",
        "checksum",
        "name",
        "series_instance_uid",
        "sha256",
        "size",
        "sop_class_uid",
        "sop_instance_uid",
        "source",
        "study_instance_uid",
        "transfer_syntax_uid",
    )

    def __init__(
        self,
        spool: Spool,
        name: str,
        size: int,
        *,
        checksum: str,
        sop_class_uid: str,
        sop_instance_uid: str,
        transfer_syntax_uid: str,
    ) -> None:
        self.name, self.size, self.checksum = name, size, checksum
        self.sop_class_uid, self.sop_instance_uid = sop_class_uid, sop_instance_uid
        self.transfer_syntax_uid = transfer_syntax_uid
        self.study_instance_uid = self.series_instance_uid = self.source = ""
        self.accept: frozenset[str] = frozenset()
        self.bytes_changed = False
        self.sha256: str | None = None
        self._spool = spool
        self._holders = 0
        self._idle_since = 0.0
        self._is_indexed = self._is_verified = True

    def __repr__(self) -> str:
        return f"<SpooledInstance {self.name} {self.size} bytes, {self._holders} holders>"

    @property
    def path(self) -> Path:
        """The file; it exists as long as somebody holds the instance."""
        return self._spool.folder / self.name

    def hold(self) -> None:
        """Keep the file until `release`; each call wants one of its own."""
        if self._holders == 0:
            self._spool._set_held(self)
        self._holders += 1

    def release(self) -> None:
        """Let go. The file stays for the retention time, or goes when it was replaced meanwhile."""
        if self._holders <= 0:
            raise ValueError(f"{self!r} is released more often than held")
        self._holders -= 1
        if self._holders == 0:
            self._spool._set_idle(self)

    def place(
        self,
        study_instance_uid: str,
        series_instance_uid: str,
        accept: Iterable[str],
        *,
        source: str,
        bytes_changed: bool = False,
    ) -> None:
        """Say where it belongs. From now on it serves further runs of the node too."""
        placed = (study_instance_uid, series_instance_uid, frozenset(accept), source, bytes_changed)
        if placed != (self.study_instance_uid, self.series_instance_uid, self.accept, self.source, self.bytes_changed):
            self.study_instance_uid, self.series_instance_uid, self.accept, self.source, self.bytes_changed = placed
            self._spool._record(self)

    def keep_sha256(self, sha256: str) -> None:
        """Remember the SHA-256 that somebody has computed while the file passed."""
        if self.sha256 is None:
            self.sha256 = sha256
            self._spool._record_sha256(self)

    def open(self) -> BinaryIO:
        """Open the Part 10 file for reading; an open file can be read to its end whatever happens to the instance."""
        return open(self.path, "rb", buffering=0)
