"""WADO-RS: instances by HTTP, streamed part by part into the Receiver.

One request is one multipart answer. Each part's File Meta Information is read and bounded; the data set behind it is
passed on as it comes, so that what is held is the same as if it had come by C-STORE.

References
----------
* DICOM PS3.18, 10.4 (Retrieve transaction), 8.7.3.5.2 (transfer-syntax parameter), 8.7.4 (multipart media types),
  10.6 (Search transaction)
* RFC 9110, 12.5.1 (Accept), 15.4 (redirection), 10.2.3 (Retry-After)
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable, Collection, Mapping, Sequence
from urllib.parse import urljoin, urlsplit

import aiohttp

from xca_imaging import settings, uids
from xca_imaging.errors import (
    ConnectFailed,
    LocalProtocolError,
    PeerBusy,
    PeerError,
    PeerProtocolError,
    PeerRefused,
    PeerTimeout,
    RemoteProtocolError,
    mapped,
)
from xca_imaging.imaging.backends import MoveJob, MoveResult, identifiers
from xca_imaging.imaging.backends.requester import new_association_id
from xca_imaging.imaging.part10 import Part10Error
from xca_imaging.imaging.part10_head import FileMeta, HeadReader
from xca_imaging.imaging.receiver import Incoming, PeerAssociation, Receiver, StoreRequest
from xca_imaging.uids import is_uid
from xca_imaging.wire import multipart

_log = logging.getLogger(__name__)

_DICOM = "application/dicom"
_ANY = "*"
_MAX_PARTS = 100_000  # instances of one answer: more than any study has
_MAX_REDIRECTS = 3
_READ_BUFFER = 256 * 1024  # bytes that are read ahead: two of aiohttp's reads
_PENDING, _SUCCESS, _WARNING, _UNABLE = 0xFF00, 0x0000, 0xB000, 0xC000  # PS3.4 Table C.4-3, for HTTP's outcomes

_ERRORS: Mapping[type[BaseException], type[PeerError]] = {
    aiohttp.ClientConnectorError: ConnectFailed,
    aiohttp.ServerTimeoutError: PeerTimeout,
    aiohttp.ServerDisconnectedError: ConnectFailed,
    aiohttp.ClientOSError: ConnectFailed,
    aiohttp.InvalidURL: PeerRefused,
    aiohttp.ClientError: PeerProtocolError,
    TimeoutError: PeerTimeout,
}


class WadoRs:
    """WADO-RS client of one PACS.

    Parameters
    ----------
    ae_title : str
        Ours, as the receiver of what comes.
    receiver : Receiver
        Takes the instances.
    tls : ssl.SSLContext, optional
        Our certificate, and whom we trust; without it, whom the system trusts.
    connect_timeout, stall_timeout : float
        Seconds for a connection to stand; without a byte.
    """

    # Mutable state: the session, made at the first request; whether the server takes a list of transfer syntaxes
    # (_takes_lists); which of its associations may be read (_may_read), by id.

    def __init__(
        self,
        pacs: settings.Pacs,
        *,
        ae_title: str,
        receiver: Receiver,
        tls: ssl.SSLContext | None = None,
        connect_timeout: float = 10.0,
        stall_timeout: float = 60.0,
    ) -> None:
        self.pacs = pacs
        self._ae_title, self._receiver, self._tls = ae_title, receiver, tls
        self._timeout = aiohttp.ClientTimeout(total=None, sock_connect=connect_timeout, sock_read=stall_timeout)
        self._session: aiohttp.ClientSession | None = None
        self._takes_lists = True
        self._may_read: dict[int, asyncio.Event] = {}

    async def move(self, job: MoveJob, on_response: Callable[[MoveResult], None]) -> MoveResult:
        """Get a study or a series by one request, or instances by one request each, one after the other.

        What comes in a transfer syntax that is not accepted is asked for once more, in the best that is.
        """
        parts = urlsplit(self.pacs.wado_rs)
        association = PeerAssociation(
            new_association_id(),
            self.pacs.ae_title,
            self._ae_title,
            parts.hostname or "",
            parts.port or (443 if parts.scheme == "https" else 80),
            "",
            "",
            self.pacs.name,
        )
        may_read = self._may_read[association.id] = asyncio.Event()
        may_read.set()
        retrieval = _Retrieval(job, association, self._receiver, on_response, may_read)
        reason = "retrieved"
        try:
            for url, uid in self._resources(job):
                await self._get(url, uid, retrieval)
        except BaseException as exc:
            reason = str(exc) or type(exc).__name__
            raise
        finally:
            del self._may_read[association.id]
            self._receiver.association_closed(association, reason)
        return retrieval.result()

    def pause(self, association: PeerAssociation) -> None:
        """Stop reading: who takes the instances is slow."""
        if may_read := self._may_read.get(association.id):
            may_read.clear()

    def resume(self, association: PeerAssociation) -> None:
        """Read on."""
        if may_read := self._may_read.get(association.id):
            may_read.set()

    async def close(self) -> None:
        """Close the connections that are kept."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    def _resources(self, job: MoveJob) -> list[tuple[str, str]]:
        """Return the URLs to get, each with the one instance that it stands for, if it does."""
        identifiers.of_job(job, uid_list_limit=self.pacs.uid_list_limit)  # raises where a key is missing
        for uid in (job.study_instance_uid, job.series_instance_uid, *job.sop_instance_uids):
            if uid and not is_uid(uid):
                raise LocalProtocolError(f"{uid!r} is no UID and cannot stand in a URL")
        study = f"{self.pacs.wado_rs.rstrip('/')}/studies/{job.study_instance_uid}"
        series = f"{study}/series/{job.series_instance_uid}"
        match job.level:
            case "STUDY":
                return [(study, "")]
            case "SERIES":
                return [(series, "")]
            case _:
                return [(f"{series}/instances/{uid}", uid) for uid in job.sop_instance_uids]

    async def _get(self, url: str, uid: str, retrieval: _Retrieval) -> None:
        accept = retrieval.accept
        retrieval.only = frozenset((uid,)) if uid else None
        lists = self._takes_lists and len(accept) > 1
        try:
            if not await self._request(url, accept if lists else accept[:1] if len(accept) == 1 else (), retrieval):
                # Some read one media type of an Accept field; Orthanc (DICOMweb 1.7) answers a list with status 500.
                await self._request(url, (), retrieval)
                self._takes_lists = False
        except _NotThere as error:
            if not uid:
                raise PeerRefused(self.pacs.name, str(error)) from None
            retrieval.failed[uid] = str(error)
        except _ServerError as error:
            retrieval.unable = str(error)
        again, retrieval.unaccepted = retrieval.unaccepted, {}
        if again:
            retrieval.only = frozenset(again)
            best = uids.EXPLICIT_VR_LITTLE_ENDIAN
            try:
                await self._request(url, (best if best in accept else accept[0],), retrieval)
            except (_NotThere, _ServerError, PeerRefused) as error:
                _log.info("%s: %s", self.pacs.name, error)
            for each, syntax in again.items():
                if each not in retrieval.taken:
                    retrieval.failed[each] = f"comes in transfer syntax {syntax}, which is not accepted"

    async def _request(self, url: str, accept: Sequence[str], retrieval: _Retrieval) -> bool:
        """Run one request to its end; false when the server does not take a list of media types."""
        if self._session is None:
            # Not gzip: pixels do not shrink, and who inflates has to bound what comes out.
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(ssl=self._tls if self._tls is not None else True, limit=0),
                auto_decompress=False,
                headers={"Accept-Encoding": "identity"},
                read_bufsize=_READ_BUFFER,
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        headers = {"Accept": _accept_field(accept)}
        with mapped(_ERRORS, self.pacs.name):
            for _ in range(_MAX_REDIRECTS + 1):
                async with self._session.get(
                    url, headers=headers, allow_redirects=False, timeout=self._timeout
                ) as response:
                    if response.status in (301, 302, 303, 307, 308):
                        url = self._redirected(url, response)
                        continue
                    if response.status in (400, 406, 415, 500) and len(accept) > 1:
                        return False
                    if response.status == 204:
                        raise _NotThere("HTTP 204: there is nothing")
                    if response.status not in (200, 206):
                        raise _failure(self.pacs.name, response)
                    try:
                        await retrieval.read(response)
                    except (aiohttp.ClientPayloadError, RemoteProtocolError) as exc:
                        if not retrieval.taken:
                            raise PeerProtocolError(self.pacs.name, f"WADO-RS: {exc}") from exc
                        retrieval.broken = f"the answer ended before it was whole: {exc}"
                    return True
        raise PeerRefused(self.pacs.name, f"WADO-RS: more than {_MAX_REDIRECTS} redirects")

    def _redirected(self, url: str, response: aiohttp.ClientResponse) -> str:
        target = urljoin(url, response.headers.get("Location", ""))
        here, there = urlsplit(url), urlsplit(target)
        if (here.scheme, here.hostname, here.port) != (there.scheme, there.hostname, there.port):
            where = f"{there.scheme}://{there.hostname}"
            raise PeerRefused(
                self.pacs.name, f"WADO-RS redirects to {where}: set pacs.wado_rs to the server that answers"
            )
        return target


class _NotThere(Exception):
    """The server has nothing for a URL."""


class _ServerError(Exception):
    """The server fails at a URL."""


def _failure(pacs: str, response: aiohttp.ClientResponse) -> Exception:
    """Return what an HTTP status means."""
    status, text = response.status, f"WADO-RS: HTTP {response.status} {response.reason or ''}".rstrip()
    if status in (404, 410):
        return _NotThere(text)
    if status in (429, 503):
        later = response.headers.get("Retry-After", "")
        return PeerBusy(pacs, text + (f", retry after {later[:40]}" if later else ""))
    if status in (401, 403):
        return PeerRefused(pacs, f"{text}: give this node access there, by its certificate or in pacs.wado_rs")
    if status == 406:
        return PeerRefused(pacs, f"{text}: not in a transfer syntax that was asked for")
    if status in (502, 504):
        return ConnectFailed(pacs, text)
    if status >= 500:
        return _ServerError(text)
    return PeerRefused(pacs, text)


def _accept_field(accept: Sequence[str]) -> str:
    """Return the Accept field for transfer syntaxes, best first; none: as it is stored."""
    media = f'multipart/related; type="{_DICOM}"; transfer-syntax='
    if len(accept) <= 1:
        return media + (accept[0] if accept else _ANY)
    # Three decimals are what a weight may have (RFC 9110, 12.4.2).
    return ", ".join(f"{media}{uid};q={max(0.001, 1 - index / 100):g}" for index, uid in enumerate(accept))


class _Retrieval:
    """What one job has got so far.

    Attributes
    ----------
    only : collection of str, optional
        SOP Instance UIDs to take from the answer that is read; None: all.
    taken : dict
        What the Receiver owns, by SOP Instance UID.
    unaccepted : dict
        Transfer syntax of what was left out because of it.
    failed : dict
        Why an instance did not come.
    broken, unable : str
        Why an answer ended too early; what the server says to be unable to do.
    """

    # Mutable state: the attributes, and the part that is being read: its head (_head), who takes it (_incoming), and
    # what it is (_uid, _syntax).

    def __init__(
        self,
        job: MoveJob,
        association: PeerAssociation,
        receiver: Receiver,
        on_response: Callable[[MoveResult], None],
        may_read: asyncio.Event,
    ) -> None:
        self.accept = tuple(dict.fromkeys(job.accept))
        self._association, self._receiver, self._on_response = association, receiver, on_response
        self._may_read = may_read
        self.only: Collection[str] | None = None
        self.taken: dict[str, str] = {}
        self.unaccepted: dict[str, str] = {}
        self.failed: dict[str, str] = {}
        self.broken = self.unable = ""
        self._uid = self._syntax = ""
        self._head: HeadReader | None = None
        self._incoming: Incoming | None = None

    def result(self) -> MoveResult:
        """Return how it ended, in the status codes that a C-GET would have."""
        failed = tuple(self.failed)
        comment = self.broken or self.unable or next(iter(self.failed.values()), "")
        status = None if self.broken else _UNABLE if self.unable else _WARNING if failed else _SUCCESS
        return MoveResult(status, len(self.taken), len(failed), failed_uids=failed, error_comment=comment)

    async def read(self, response: aiohttp.ClientResponse) -> None:
        """Read one answer to its end."""
        coding = response.headers.get("Content-Encoding", "identity")
        if coding != "identity":
            raise PeerProtocolError(
                self._association.pacs or "", f"WADO-RS: content coding {coding[:40]!r} was not asked for"
            )
        content_type = multipart.parse_content_type(response.headers.get("Content-Type", ""))
        try:
            if content_type.media_type == "multipart/related":
                await self._read_parts(response, content_type)
            elif content_type.media_type == _DICOM:
                await self._read_single(response)
            else:
                text = f"WADO-RS: answered with {content_type.media_type} instead of DICOM"
                raise PeerProtocolError(self._association.pacs or "", text)
        finally:
            self._drop("the answer broke off")

    async def _read_parts(self, response: aiohttp.ClientResponse, content_type: multipart.ContentType) -> None:
        boundary = content_type.parameters.get("boundary", "")
        reader = multipart.Reader(boundary.encode("latin-1", "replace"), max_parts=_MAX_PARTS)
        async for chunk in response.content.iter_any():
            for event in reader.receive(chunk):
                match event:
                    case multipart.PartStart():
                        self._head = HeadReader()
                    case multipart.PartData(view):
                        self._take(view)
                    case multipart.PartEnd():
                        self._finish()
            await self._may_read.wait()
        reader.close()

    async def _read_single(self, response: aiohttp.ClientResponse) -> None:
        if "Content-Length" not in response.headers and "Transfer-Encoding" not in response.headers:
            text = "WADO-RS: an instance that ends with its connection cannot be known to be whole"
            raise PeerProtocolError(self._association.pacs or "", text)
        self._head = HeadReader()
        async for chunk in response.content.iter_any():
            self._take(memoryview(chunk))
            await self._may_read.wait()
        self._finish()

    def _take(self, view: memoryview) -> None:
        """Take the next octets of the part."""
        if self._head is not None:
            try:
                start = self._head.receive(view)
            except Part10Error as exc:
                _log.warning("%s: a part of a WADO-RS answer is left out: %s", self._association.pacs, exc)
                self._head = None
                return
            if start is None:
                return
            meta, self._head = self._head.meta, None
            assert meta is not None
            self._incoming = self._begin(meta)
            view = view[start:]
        if self._incoming is not None and view:
            try:
                self._incoming.write(view)
            except Exception as exc:
                # As in the Storage SCP: what cannot be kept is read and dropped, the next may fit again.
                _log.error("%s: an instance is left out: %s", self._association.pacs, exc)
                self._drop(str(exc))

    def _begin(self, meta: FileMeta) -> Incoming | None:
        uid, syntax = meta.sop_instance_uid, meta.transfer_syntax_uid
        if not (is_uid(uid) and is_uid(meta.sop_class_uid) and is_uid(syntax)):
            _log.warning("%s: a part of a WADO-RS answer does not say what it is", self._association.pacs)
            return None
        if (self.only is not None and uid not in self.only) or uid in self.taken:
            return None
        if self.accept and syntax not in self.accept:
            self.unaccepted[uid] = syntax
            return None
        request = StoreRequest(self._association, meta.sop_class_uid, uid, syntax, None, None)
        begun = self._receiver.begin(request)
        if isinstance(begun, int):
            return None
        self._uid, self._syntax = uid, syntax
        return begun

    def _finish(self) -> None:
        """The part is whole."""
        self._head = None
        incoming, self._incoming = self._incoming, None
        if incoming is None:
            return
        try:
            status = incoming.commit()
        except Exception:
            incoming.discard("it could not be kept")
            raise
        incoming.conclude()
        if status == _SUCCESS:
            self.taken[self._uid] = self._syntax
            self._on_response(MoveResult(_PENDING, completed=len(self.taken)))

    def _drop(self, reason: str) -> None:
        incoming, self._incoming = self._incoming, None
        if incoming is not None:
            incoming.discard(reason)


async def reach(
    pacs: settings.Pacs,
    *,
    tls: ssl.SSLContext | None = None,
    connect_timeout: float = 10.0,
    stall_timeout: float = 10.0,
) -> str:
    """Ask a DICOMweb server for one study, and return what it answered with.

    Raises
    ------
    PeerError
        It cannot be reached, or does not let us in.
    """
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=connect_timeout, sock_read=stall_timeout)
    url = f"{pacs.wado_rs.rstrip('/')}/studies"
    with mapped(_ERRORS, pacs.name):
        connector = aiohttp.TCPConnector(ssl=tls if tls is not None else True)
        async with (
            aiohttp.ClientSession(connector=connector, timeout=timeout) as session,
            session.get(
                url, params={"limit": "1"}, headers={"Accept": "application/dicom+json"}, allow_redirects=False
            ) as response,
        ):
            if response.status in (401, 403) or response.status >= 500:
                raise PeerRefused(pacs.name, f"HTTP {response.status} {response.reason or ''}".rstrip())
            return f"HTTP {response.status}"
