"""Where a running node listens, for the verbs that talk to it.

A configuration with port 0 does not say where its node listens, so `serve` writes the addresses it was given into
`data_dir/listeners.json`.
"""

from __future__ import annotations

import json
from pathlib import Path

from xca_imaging.errors import ConfigurationError
from xca_imaging.settings import Settings

_ANY_HOST = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}  # noqa: S104 - a listener's wildcard, not ours


def write(settings: Settings, http: tuple[str, int], dicom: tuple[str, int]) -> None:
    """Record the bound addresses of both listeners."""
    _file(settings).write_text(json.dumps({"http": http, "dicom": dicom}) + "\n", encoding="utf-8")


def remove(settings: Settings) -> None:
    """Forget them when the node stops."""
    _file(settings).unlink(missing_ok=True)


def base_url(settings: Settings) -> str:
    """Return the URL of this node's own HTTP listener, without a path.

    Raises
    ------
    ConfigurationError
        The port is chosen at start, and no node is running.
    """
    host, port = settings.http.host, settings.http.port
    if port == 0:
        try:
            host, port = json.loads(_file(settings).read_text(encoding="utf-8"))["http"]
        except (OSError, ValueError, KeyError) as exc:
            raise ConfigurationError(
                str(settings.file), "http.port", "is 0 and no node is running", "start `xca-imaging serve` first"
            ) from exc
    return f"{'https' if settings.http.tls else 'http'}://{address(host, port)}"


def address(host: str, port: int) -> str:
    """Return `host:port` as it stands in a URL, a wildcard host as loopback."""
    host = _ANY_HOST.get(host, host)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _file(settings: Settings) -> Path:
    return settings.data_dir / "listeners.json"
