"""Associations that we request from a PACS: pynetdicom with typed refusals and threads that end.

pynetdicom tells of a failed association only by a flag, and now and then by the wrong one (a rejected association
looks aborted). What the peer said is therefore read from the PDUs themselves, by an event handler, and what stays
unclear is tried again, a bounded number of times.

References
----------
* DICOM PS3.8, 9.3.4 and Table 9-21 (A-ASSOCIATE-RJ: result, source, reason)
* DICOM PS3.8, 9.3.8 and Table 9-26 (A-ABORT)
* DICOM PS3.4, Annex A (Verification)
"""

from __future__ import annotations

import logging
import socket
import ssl
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pynetdicom import AE, evt
from pynetdicom.pdu import A_ABORT_RQ, A_ASSOCIATE_AC, A_ASSOCIATE_RJ
from pynetdicom.presentation import build_context
from pynetdicom.transport import AssociationSocket

from xca_imaging import settings, uids
from xca_imaging.errors import ConnectFailed, LocalProtocolError, PeerBusy, PeerError, PeerRefused, PeerTimeout

if TYPE_CHECKING:
    from pynetdicom.association import Association

_log = logging.getLogger(__name__)

DEFAULT_SYNTAXES = (uids.EXPLICIT_VR_LITTLE_ENDIAN, uids.IMPLICIT_VR_LITTLE_ENDIAN)
"""Proposed for a context that names none: C-FIND and C-MOVE identifiers are small, so explicit comes first."""

# PS3.8 Table 9-21, as (source, reason): what a person can do about it. `{ae}` is our AE title, `{at}` where it listens.
_REJECTIONS = {
    (1, 2): "the application context name is not supported",
    (1, 3): "our calling AE title {ae!r} is not known there: add {ae!r}{at} to the PACS's list of remote AEs",
    (1, 7): "the called AE title {called!r} is not its own: correct pacs.ae_title",
    (2, 2): "the protocol version is not supported",
    (3, 1): "temporary congestion",
    (3, 2): "local limit of associations exceeded",
}
_TRANSIENT = 2  # PS3.8 Table 9-21: result "rejected-transient"
_PRESENTATION = 3  # PS3.8 Table 9-21: source "service-provider, presentation related": congestion and limits only


_PDU_SILENCE = 15.0
"""Seconds without a byte inside a PDU: a PDU of ours is a few hundred bytes, so its sender has gone."""


class _ClosingSocket(AssociationSocket):  # type: ignore[misc]  # pynetdicom has no types
    """pynetdicom 3.0 leaves a socket open when it cannot be shut down first, for example after a refused connection."""

    def _shutdown_socket(self) -> None:
        opened = self.socket
        super()._shutdown_socket()
        if opened is not None:
            opened.close()


class _RequestingEntity(AE):  # type: ignore[misc]
    """The Application Entity of one association request."""

    def _create_socket(self, assoc: Association, address: Any, tls_args: Any) -> _ClosingSocket:
        opened = _ClosingSocket(assoc, address=address)
        opened.tls_args = tls_args
        return opened


@dataclass(slots=True)
class _Seen:
    """What the peer said during one request; written by pynetdicom's thread, read after it has come back."""

    connected: bool = False
    accepted: bool = False
    rejected: tuple[int, int, int] | None = None
    aborted: tuple[int, int] | None = None

    def on_connection(self, event: Any) -> None:
        self.connected = True
        event.assoc.dul.socket.socket.settimeout(_PDU_SILENCE)

    def on_pdu(self, event: Any) -> None:
        match event.pdu:
            case A_ASSOCIATE_RJ() as pdu:
                self.rejected = (pdu.result, pdu.source, pdu.reason_diagnostic)
            case A_ASSOCIATE_AC():
                self.accepted = True
            case A_ABORT_RQ() as pdu:
                self.aborted = (pdu.source, pdu.reason_diagnostic)


@contextmanager
def associate(
    pacs: settings.Pacs,
    *,
    calling_ae_title: str,
    contexts: Sequence[str | tuple[str, Sequence[str]]],
    tls: ssl.SSLContext | None = None,
    listener: tuple[str, int] | None = None,
    connect_timeout: float = 10.0,
    response_timeout: float | None = 30.0,
    attempts: int = 3,
    end_timeout: float = 3.0,
) -> Iterator[Association]:
    """Open an association, give it to the body, release it; abort it when the body raises.

    Blocks: call it in an executor. No thread outlives the call.

    Parameters
    ----------
    contexts : sequence
        Abstract syntaxes, or (abstract syntax, transfer syntaxes) pairs.
    listener : tuple, optional
        Host and port of our Storage SCP, only for texts that tell a person what to configure on the PACS.
    connect_timeout : float
        For TCP, TLS and the answer to A-ASSOCIATE-RQ, each: ten seconds are long for a PACS that is there.
    response_timeout : float or None
        For each DIMSE response; None waits for ever (for operations that others watch for progress).
    attempts : int
        Requests that end neither established nor refused (closed or aborted without a word) are made so many times:
        pynetdicom loses about one rejection in twelve, so three leave one in two thousand.
    end_timeout : float
        Longest wait for release and for threads to end.

    Raises
    ------
    ConnectFailed, PeerBusy, PeerRefused, PeerTimeout
    """
    for attempt in range(1, attempts + 1):
        association, seen, elapsed = _request(pacs, calling_ae_title, contexts, tls, connect_timeout, response_timeout)
        if association.is_established:
            break
        _end(association, end_timeout)
        error = _explain(pacs, calling_ae_title, contexts, tls, listener, connect_timeout, seen, elapsed)
        if not isinstance(error, ConnectFailed) or not seen.connected or attempt == attempts:
            raise error
        _log.info("association with %s ended without an answer, attempt %d of %d", pacs.name, attempt, attempts)
        time.sleep(0.05 * attempt)  # a peer that closes under load is given a moment; far below any time-out
    try:
        yield association
    except (RuntimeError, OSError) as exc:
        # pynetdicom raises RuntimeError for a message on an association that the peer has ended meanwhile.
        lost = not association.is_established
        _abort(association)
        if lost:
            raise ConnectFailed(pacs.name, "the association was lost before the operation ended") from exc
        raise
    except BaseException:
        _abort(association)
        raise
    else:
        association.acse_timeout = end_timeout
        if association.is_established:
            association.release()
    finally:
        _end(association, end_timeout)


def echo(
    pacs: settings.Pacs,
    *,
    calling_ae_title: str,
    tls: ssl.SSLContext | None = None,
    listener: tuple[str, int] | None = None,
    connect_timeout: float = 10.0,
    response_timeout: float = 10.0,
) -> None:
    """Verify a PACS with C-ECHO; return when it answered Success.

    Raises
    ------
    PeerError
        Whatever `associate` raises; PeerTimeout without an answer; PeerRefused with another status.
    """
    with associate(
        pacs,
        calling_ae_title=calling_ae_title,
        contexts=[uids.VERIFICATION_SOP_CLASS],
        tls=tls,
        listener=listener,
        connect_timeout=connect_timeout,
        response_timeout=response_timeout,
    ) as association:
        answer = association.send_c_echo()
    status = answer.get("Status")
    if status is None:
        raise PeerTimeout(pacs.name, f"no answer to C-ECHO within {response_timeout:g} s")
    if status != 0x0000:
        raise PeerRefused(pacs.name, f"C-ECHO answered with status 0x{status:04X}")


def _request(
    pacs: settings.Pacs,
    calling_ae_title: str,
    contexts: Sequence[str | tuple[str, Sequence[str]]],
    tls: ssl.SSLContext | None,
    connect_timeout: float,
    response_timeout: float | None,
) -> tuple[Association, _Seen, float]:
    if not contexts:
        raise LocalProtocolError("an association needs at least one presentation context (PS3.8 Table 9-11)")
    ae = _RequestingEntity(ae_title=calling_ae_title)
    ae.implementation_class_uid = uids.IMPLEMENTATION_CLASS_UID
    ae.implementation_version_name = uids.IMPLEMENTATION_VERSION_NAME
    ae.connection_timeout = connect_timeout
    ae.acse_timeout = connect_timeout
    ae.dimse_timeout = response_timeout
    ae.network_timeout = None  # an association lives for one operation, which has its own limits
    seen = _Seen()
    proposed = [
        build_context(c, list(DEFAULT_SYNTAXES)) if isinstance(c, str) else build_context(c[0], list(c[1]))
        for c in contexts
    ]
    started = time.monotonic()
    try:
        association = ae.associate(
            pacs.host,
            pacs.port,
            contexts=proposed,
            ae_title=pacs.ae_title,
            tls_args=(tls, pacs.host) if tls else None,
            evt_handlers=[(evt.EVT_CONN_OPEN, seen.on_connection), (evt.EVT_PDU_RECV, seen.on_pdu)],
        )
    except OSError as exc:  # the name cannot be resolved, or no socket is left
        raise ConnectFailed(pacs.name, f"no connection to {pacs.host}:{pacs.port}: {exc}") from exc
    return association, seen, time.monotonic() - started


def _explain(
    pacs: settings.Pacs,
    calling_ae_title: str,
    contexts: Sequence[str | tuple[str, Sequence[str]]],
    tls: ssl.SSLContext | None,
    listener: tuple[str, int] | None,
    connect_timeout: float,
    seen: _Seen,
    elapsed: float,
) -> PeerError:
    if seen.rejected is not None:
        result, source, reason = seen.rejected
        known = _REJECTIONS.get((source, reason), "no reason given")
        at = f" at {listener[0]}:{listener[1]}" if listener else ""
        known = known.format(ae=calling_ae_title, at=at, called=pacs.ae_title)
        text = f"association rejected ({result}/{source}/{reason}): {known}"
        busy = result == _TRANSIENT or source == _PRESENTATION
        return PeerBusy(pacs.name, text) if busy else PeerRefused(pacs.name, text)
    if not seen.connected:
        cause = _connection_error(pacs, tls, connect_timeout)
        return ConnectFailed(pacs.name, f"no connection to {pacs.host}:{pacs.port}: {cause}")
    if seen.accepted:
        names = ", ".join(c if isinstance(c, str) else c[0] for c in contexts)
        return PeerRefused(pacs.name, f"association accepted without any of the presentation contexts asked: {names}")
    if seen.aborted is not None:
        source, reason = seen.aborted
        return ConnectFailed(pacs.name, f"A-ABORT ({source}/{reason}) in answer to the association request")
    if elapsed >= connect_timeout:
        return PeerTimeout(pacs.name, f"no answer to the association request within {connect_timeout:g} s")
    return ConnectFailed(pacs.name, "closed the connection without an answer to the association request")


def _connection_error(pacs: settings.Pacs, tls: ssl.SSLContext | None, timeout: float) -> str:
    """Connect once more, only to learn why it fails: pynetdicom keeps the cause to its log."""
    try:
        with socket.create_connection((pacs.host, pacs.port), timeout) as raw:
            if tls is not None:
                with tls.wrap_socket(raw, server_hostname=pacs.host):
                    pass
    except OSError as exc:
        return str(exc) or type(exc).__name__
    return f"not within {timeout:g} s at first, a second time it was possible"


def _abort(association: Association) -> None:
    if association.is_established:
        association.abort(block=False)


def _end(association: Association, timeout: float) -> None:
    """Wait until both threads of an association are gone, so that none outlives its operation.

    pynetdicom's own `kill` waits without limit for a state machine that a silent peer can hold up; here the machine is
    given `timeout` to come to rest (Sta1, PS3.8 Table 9-1), then its socket is taken away.
    """
    upper_layer = association.dul
    deadline = time.monotonic() + timeout
    while upper_layer.is_alive() and upper_layer.state_machine.current_state != "Sta1" and time.monotonic() < deadline:
        time.sleep(0.002)
    opened = upper_layer.socket.socket if upper_layer.socket else None
    if opened is not None:
        with suppress(OSError):
            opened.shutdown(socket.SHUT_RDWR)
    upper_layer.kill_dul()
    upper_layer.join(timeout)
    if upper_layer.is_alive():
        _log.warning("a thread of an association did not end within %g s", timeout)
        return
    association.kill()
    if association.ident is not None:  # a refused association never starts its own thread
        association.join(timeout)
    if opened is not None:
        opened.close()
