"""Documents in an object store (S3 and what speaks its protocol, or any other that fsspec knows).

Objects lie under `<prefix>/ab/cd/<sha-256 in hex>`. An object store shows an object whole or not at all, so there is no
place for what is half written. Credentials, region and endpoint are those of the environment, as the store's own tools
find them (for S3: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL, ~/.aws, instance roles).

References
----------
* fsspec: "API Reference" (AbstractFileSystem)
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from xca_imaging import errors


class RemoteStore:
    """Content by SHA-256 below one URL (`s3://bucket/prefix`). Thread-safe.

    Raises
    ------
    errors.ConfigurationError
        The URL's kind of store is not known, or its library is not installed.
    """

    # Mutable state: none of its own; the file system has its sessions.

    def __init__(self, url: str) -> None:
        self.url = url
        try:
            import fsspec

            # Listings are read again each time: other nodes write to the same store.
            self._files, self._prefix = fsspec.core.url_to_fs(url, use_listings_cache=False)
        except (ImportError, ValueError) as problem:
            raise errors.ConfigurationError(
                url, "repository.store", f"cannot be used: {problem}", "for S3: pip install 'xca-imaging[s3]'"
            ) from problem

    @classmethod
    def open(cls, url: str) -> RemoteStore | None:
        """Return the store of `repository.store`; None for an empty URL: documents stay on this machine."""
        return cls(url) if url else None

    def put(self, path: Path, sha256: str) -> None:
        """Copy a local file there; durable when it returns."""
        with self._mapped():
            target = self._path(sha256)
            self._files.makedirs(target.rpartition("/")[0], exist_ok=True)
            self._files.put_file(str(path), target)

    def size(self, sha256: str) -> int | None:
        """Return how long a content is, None when it is not there."""
        with self._mapped():
            try:
                return int(self._files.info(self._path(sha256))["size"])
            except FileNotFoundError:
                return None

    def get(self, sha256: str, path: Path) -> bool:
        """Copy a content to a local file; False when it is not there."""
        with self._mapped():
            try:
                self._files.get_file(self._path(sha256), str(path))
            except FileNotFoundError:
                return False
        return True

    def remove(self, sha256: str) -> None:
        """Remove a content, if it is there."""
        with self._mapped():
            try:
                self._files.rm_file(self._path(sha256))
            except FileNotFoundError:
                return

    def names(self, prefix: str) -> Iterator[tuple[str, float]]:
        """Yield the contents whose first two digits are `prefix`, with their age in seconds."""
        now = time.time()
        with self._mapped():
            try:
                found = self._files.find(f"{self._prefix}/{prefix}", detail=True)
            except FileNotFoundError:
                return
        for path, info in found.items():
            yield path.rpartition("/")[2], now - _modified(info)

    def _path(self, sha256: str) -> str:
        return f"{self._prefix}/{sha256[:2]}/{sha256[2:4]}/{sha256}"

    @contextmanager
    def _mapped(self) -> Iterator[None]:
        """Turn what the libraries raise, which have no common root, into one error with a meaning."""
        try:
            yield
        except Exception as problem:
            text = f"the document store {self.url} does not do what is asked: {type(problem).__name__}"
            raise errors.RepositoryBusy(text) from problem


def _modified(info: dict[str, Any]) -> float:
    """Return when an object was written, as seconds since the epoch; now where the store does not say."""
    for key in ("LastModified", "mtime", "created", "last_modified"):
        value = info.get(key)
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, int | float):
            return float(value)
    return time.time()
