"""The error tree.

A class says what went wrong, what it means on each wire and whether trying again helps. Nothing below the gateway
turns an error into XML, an HTTP status or a DIMSE status: that happens once, in `gateway/exchange.py` for SOAP and in
`imaging/store_scp.py` for DIMSE. Instances carry what a person needs to act: peer, UID, limit, section.

References
----------
* IHE ITI TF-3, 4.2.4 (success and error reporting), Table 4.2.4.1-2 (error codes)
* SOAP 1.2 Part 1, 5.4 (faults); WS-Addressing 1.0 SOAP Binding, 6.4 (predefined faults)
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import ClassVar

from xca_imaging import uids


class Retry(enum.Enum):
    """Whether asking the same thing again can help."""

    NEVER = "never"
    """The same request fails the same way."""
    LATER = "later"
    """The peer is busy or away; the same request may succeed after a pause."""


class XcaImagingError(Exception):
    """Root of every error that this package raises on purpose."""

    retry: ClassVar[Retry] = Retry.NEVER


class ConfigurationError(XcaImagingError):
    """The configuration cannot be used as it is.

    Parameters
    ----------
    file : str
        The file that a person has to edit.
    key : str
        Dotted path of the key (`pacs[0].port`), empty when the file as a whole is at fault.
    problem, hint : str
        What is wrong and what to do about it.
    """

    def __init__(self, file: str, key: str, problem: str, hint: str = "") -> None:
        self.file, self.key, self.problem, self.hint = file, key, problem, hint
        where = f"{file}: {key}" if key else file
        super().__init__(f"{where}: {problem}" + (f" ({hint})" if hint else ""))


# --------------------------------------------------------------------------------------------------------------------
# Bytes or messages break a standard
# --------------------------------------------------------------------------------------------------------------------


class ProtocolError(XcaImagingError):
    """Bytes or messages break a standard."""


class LocalProtocolError(ProtocolError):
    """We were about to break it: a defect of ours or of the caller."""


class RemoteProtocolError(ProtocolError):
    """The peer broke it.

    `fault_code` is the local name of the SOAP 1.2 fault code that answers it, `fault_subcodes` the chain of subcodes
    as (namespace, local name). DICOM readers answer it with A-ABORT.
    """

    fault_code: ClassVar[str] = "Sender"
    fault_subcodes: tuple[tuple[str, str], ...] = ()


class MessageTooLarge(RemoteProtocolError):
    """A part, header or element count is over its limit; the message names the limit."""


class MalformedMime(RemoteProtocolError):
    """A MIME multipart message breaks RFC 2046 or RFC 2387."""


class MalformedXml(RemoteProtocolError):
    """Not well-formed XML, or XML with what we never read (DTD, entities, too deep)."""


class MalformedMessage(RemoteProtocolError):
    """Well-formed XML that is not the SOAP message or the transaction body it should be."""


class VersionMismatch(RemoteProtocolError):
    """The envelope is not SOAP 1.2."""

    fault_code = "VersionMismatch"


class MustUnderstand(RemoteProtocolError):
    """Header blocks marked mustUnderstand that we do not know; `headers` are (namespace, local name) pairs."""

    fault_code = "MustUnderstand"

    def __init__(self, headers: tuple[tuple[str, str], ...]) -> None:
        self.headers = headers
        super().__init__("header not understood: " + ", ".join(f"{{{ns}}}{name}" for ns, name in headers))


class ActionNotSupported(RemoteProtocolError):
    """wsa:Action names nothing that this endpoint does."""

    fault_subcodes = ((uids.NS_WSA, "ActionNotSupported"),)

    def __init__(self, action: str) -> None:
        self.action = action
        super().__init__(f"the [action] {action!r} cannot be processed at this endpoint")


class AddressingHeaderRequired(RemoteProtocolError):
    """A WS-Addressing header that must be there is missing; `header` is its local name."""

    fault_subcodes = ((uids.NS_WSA, "MessageAddressingHeaderRequired"),)

    def __init__(self, header: str) -> None:
        self.header = header
        super().__init__(f"a required header representing a message addressing property is not present: wsa:{header}")


class InvalidAddressingHeader(RemoteProtocolError):
    """A WS-Addressing header is there and wrong.

    `reason` is the second subcode: InvalidCardinality, ActionMismatch, InvalidAddress,
    OnlyAnonymousAddressSupported, ...
    """

    def __init__(self, header: str, reason: str, text: str) -> None:
        self.header, self.reason = header, reason
        self.fault_subcodes = ((uids.NS_WSA, "InvalidAddressingHeader"), (uids.NS_WSA, reason))
        super().__init__(f"wsa:{header}: {text}")


class DicomProtocolError(RemoteProtocolError):
    """A PDU, PDV or command set breaks PS3.8 or PS3.7; answered with A-ABORT.

    `abort_reason` is the reason/diagnostic of the service-provider abort (PS3.8 Table 9-26).
    """

    def __init__(self, text: str, abort_reason: int = 0) -> None:
        self.abort_reason = abort_reason
        super().__init__(text)


class NotificationError(RemoteProtocolError):
    """An Instance Availability Notification that is not taken; `status` is the DIMSE status that answers it."""

    def __init__(self, text: str, status: int) -> None:
        self.status = status
        super().__init__(text)


# --------------------------------------------------------------------------------------------------------------------
# Who may do what
# --------------------------------------------------------------------------------------------------------------------


class AccessError(XcaImagingError):
    """The caller may not do this."""


# --------------------------------------------------------------------------------------------------------------------
# IHE error codes
# --------------------------------------------------------------------------------------------------------------------


class RegistryError(XcaImagingError):
    """One rs:RegistryError: raised when it ends a request, kept as a value where a request goes on without an item.

    Parameters
    ----------
    context : str
        codeContext: what a person at the other end needs, never patient data beyond the ids that they sent.
    location : str
        Per transaction: DocumentUniqueId (ITI-43, RAD-69), home community id (ITI-38/39, RAD-75), or empty.
    warning : bool
        Severity Warning instead of Error.
    """

    code: str = "XDSRegistryError"

    def __init__(self, context: str, location: str = "", *, warning: bool = False, code: str = "") -> None:
        self.context, self.location, self.warning = context, location, warning
        if code:
            self.code = code
        super().__init__(f"{self.code}: {context}" + (f" [{location}]" if location else ""))

    @property
    def severity(self) -> str:
        return uids.SEVERITY_WARNING if self.warning else uids.SEVERITY_ERROR

    def at(self, location: str, context: str | None = None) -> RegistryError:
        """Return the same error with another location (and context)."""
        return type(self)(self.context if context is None else context, location, warning=self.warning, code=self.code)

    @staticmethod
    def from_code(code: str, context: str, location: str = "", *, warning: bool = False) -> RegistryError:
        """Return the error of a peer: its own class where the code is known, else a plain one with that code."""
        return _BY_CODE.get(code, RegistryError)(context, location, warning=warning, code=code)


class RegistryMetadataError(RegistryError):
    """Structure, required attribute or format of metadata is wrong (registry side)."""

    code = "XDSRegistryMetadataError"


class RepositoryMetadataError(RegistryError):
    """The same, found by the repository: also a hash or size that differs from the content."""

    code = "XDSRepositoryMetadataError"


class RegistryBusy(RegistryError):
    """The registry has too much to do; try later."""

    code = "XDSRegistryBusy"
    retry = Retry.LATER


class RepositoryBusy(RegistryError):
    """The repository, or the imaging source behind it, has too much to do; try later."""

    code = "XDSRepositoryBusy"
    retry = Retry.LATER


class RepositoryOutOfResources(RegistryError):
    """No room for the documents or images of this request; try later."""

    code = "XDSRepositoryOutOfResources"
    retry = Retry.LATER


class RegistryOutOfResources(RegistryError):
    """The registry cannot store any more."""

    code = "XDSRegistryOutOfResources"
    retry = Retry.LATER


class RepositoryError(RegistryError):
    """Generic error of a retrieve: only where nothing more specific exists."""

    code = "XDSRepositoryError"


class RegistryNotAvailable(RegistryError):
    """The repository cannot reach its registry."""

    code = "XDSRegistryNotAvailable"
    retry = Retry.LATER


class DocumentUniqueIdError(RegistryError):
    """The document or instance is unknown to that repository or source."""

    code = "XDSDocumentUniqueIdError"


class UnknownRepositoryId(RegistryError):
    """RepositoryUniqueId is not ours and cannot be routed."""

    code = "XDSUnknownRepositoryId"


class UnknownCommunity(RegistryError):
    """Home community id unknown here."""

    code = "XDSUnknownCommunity"


class UnavailableCommunity(RegistryError):
    """Home community known, its gateway not reachable."""

    code = "XDSUnavailableCommunity"
    retry = Retry.LATER


class MissingHomeCommunityId(RegistryError):
    """Home community id required and absent."""

    code = "XDSMissingHomeCommunityId"


class DuplicateUniqueIdInMessage(RegistryError):
    """The same uniqueId twice in a submission (registry side)."""

    code = "XDSRegistryDuplicateUniqueIdInMessage"


class RepositoryDuplicateUniqueIdInMessage(RegistryError):
    """The same uniqueId twice in a submission (repository side)."""

    code = "XDSRepositoryDuplicateUniqueIdInMessage"


class DuplicateUniqueIdInRegistry(RegistryError):
    """SubmissionSet or Folder uniqueId already used."""

    code = "XDSDuplicateUniqueIdInRegistry"


class NonIdenticalHash(RegistryError):
    """uniqueId already registered with another hash."""

    code = "XDSNonIdenticalHash"


class NonIdenticalSize(RegistryError):
    """uniqueId already registered with another size."""

    code = "XDSNonIdenticalSize"


class MissingDocument(RegistryError):
    """Metadata without its document."""

    code = "XDSMissingDocument"


class MissingDocumentMetadata(RegistryError):
    """A document without its metadata."""

    code = "XDSMissingDocumentMetadata"


class UnresolvedReference(RegistryError):
    """A reference names nothing in the submission or the registry."""

    code = "UnresolvedReferenceException"


class DeprecatedDocumentError(RegistryError):
    """An association's target is deprecated."""

    code = "XDSRegistryDeprecatedDocumentError"


class PatientIdDoesNotMatch(RegistryError):
    """Objects of one submission belong to different patients."""

    code = "XDSPatientIdDoesNotMatch"


class UnknownPatientId(RegistryError):
    """The patient identifier, or its domain, is not known to the registry."""

    code = "XDSUnknownPatientId"


class ResultNotSinglePatient(RegistryError):
    """A LeafClass answer would mix patients."""

    code = "XDSResultNotSinglePatient"


class StoredQueryMissingParam(RegistryError):
    """A required query parameter is missing."""

    code = "XDSStoredQueryMissingParam"


class StoredQueryParamNumber(RegistryError):
    """A query parameter has the wrong number or form of values."""

    code = "XDSStoredQueryParamNumber"


class UnknownStoredQuery(RegistryError):
    """The query id is not one of ours."""

    code = "XDSUnknownStoredQuery"


class TooManyResults(RegistryError):
    """More LeafClass results than the registry returns."""

    code = "XDSTooManyResults"


class MetadataUpdateError(RegistryError):
    """An update of metadata breaks a rule for which there is no narrower code (ITI-57)."""

    code = "XDSMetadataUpdateError"


class MetadataUpdateOperationError(RegistryError):
    """What an update asks for is none of the operations of ITI-57."""

    code = "XDSMetadataUpdateOperationError"


class MetadataVersionError(RegistryError):
    """The object has been updated since the version that an update starts from (ITI-57)."""

    code = "XDSMetadataVersionError"


class PatientIdReconciliationError(RegistryError):
    """An update would move an object to another patient (ITI-57)."""

    code = "XDSPatientIDReconciliationError"


class ReferencesExist(RegistryError):
    """An object cannot be removed while an association that stays names it (ITI-62)."""

    code = "ReferencesExistException"


class UnreferencedObject(RegistryError):
    """A removal would leave an object that no association names any more (ITI-62)."""

    code = "XDSUnreferencedObjectException"


class RemoveDocumentsError(RegistryError):
    """A document cannot be removed (ITI-86)."""

    code = "XDSRemoveDocumentsError"


class ExtraMetadataNotSaved(RegistryError):
    """Warning: metadata beyond the profile was dropped."""

    code = "XDSExtraMetadataNotSaved"


class SubmissionRefused(XcaImagingError):
    """A submission, or a query, failed as a whole with one or more registry errors."""

    def __init__(self, errors: Iterable[RegistryError]) -> None:
        self.errors = tuple(errors)
        super().__init__("; ".join(map(str, self.errors)))


def _all_subclasses(cls: type[RegistryError]) -> Iterator[type[RegistryError]]:
    for sub in cls.__subclasses__():
        yield sub
        yield from _all_subclasses(sub)


_BY_CODE: Mapping[str, type[RegistryError]] = {cls.code: cls for cls in _all_subclasses(RegistryError)}


# --------------------------------------------------------------------------------------------------------------------
# Imaging
# --------------------------------------------------------------------------------------------------------------------


class ImagingError(XcaImagingError):
    """An instance or manifest cannot be had; `registry_error` is the code of the document's RegistryError."""

    registry_error: ClassVar[type[RegistryError]] = RepositoryError


class OutputError(ImagingError):
    """A retrieved instance cannot be written where it was to go: no room, no permission."""


class ManifestError(ImagingError):
    """A KOS manifest cannot be built or read."""


class StudyNotFound(ManifestError):
    """The PACS answers to the end and has no such study."""


class ReportError(ImagingError):
    """An encapsulated document is not what it says it is."""


class SpoolFull(ImagingError):
    """The spool's quota, or the disk behind it, has no room; DIMSE status 0xA700."""

    registry_error = RepositoryOutOfResources
    retry = Retry.LATER


class SpoolInUse(ImagingError):
    """Another process has the directory of the spool."""

    def __init__(self, directory: str) -> None:
        super().__init__(f"{directory} is in use by another process")


class ArrivalBroken(ImagingError):
    """An instance that somebody read along while it arrived broke off."""


# --------------------------------------------------------------------------------------------------------------------
# Peers
# --------------------------------------------------------------------------------------------------------------------


class PeerError(XcaImagingError):
    """A peer (PACS, registry, gateway) did not do what was asked.

    Parameters
    ----------
    peer : str
        The peer as the configuration names it.
    text : str
        What happened, with the phase it happened in.
    """

    registry_error: ClassVar[type[RegistryError]] = RepositoryError

    def __init__(self, peer: str, text: str) -> None:
        self.peer = peer
        super().__init__(f"{peer}: {text}")


class ConnectFailed(PeerError):
    """No connection: refused, unreachable, name unknown, TLS handshake failed."""

    retry = Retry.LATER


class PeerTimeout(PeerError):
    """Nothing moved for longer than the no-progress limit."""

    retry = Retry.LATER


class PeerBusy(PeerError):
    """The peer refused for now (A-ASSOCIATE-RJ 2/3/2, 0xA7xx, HTTP 503)."""

    registry_error = RepositoryBusy
    retry = Retry.LATER


class PeerRefused(PeerError):
    """The peer refused for good: status, fault or rejection that repeating does not change."""


class PeerFault(PeerRefused):
    """The peer answered with a SOAP fault; `code` is the innermost subcode's or the code's local name."""

    def __init__(self, peer: str, code: str, reason: str) -> None:
        self.code, self.reason = code, reason
        super().__init__(peer, f"SOAP fault {code}: {reason}")


class PeerProtocolError(PeerError):
    """The peer's answer breaks a standard, or ended before it was whole."""


@contextmanager
def mapped(table: Mapping[type[BaseException], type[PeerError]], peer: str) -> Iterator[None]:
    """Turn low-level exceptions into the peer errors of `table`, keeping the cause.

    The first entry whose key matches wins, so put subclasses first.
    """
    try:
        yield
    except XcaImagingError:
        raise
    except tuple(table) as exc:
        for low, high in table.items():
            if isinstance(exc, low):
                raise high(peer, str(exc) or type(exc).__name__) from exc
        raise
