"""DICOM Upper Layer PDUs: bytes to values and back.

`Reader` is incremental and never holds presentation data: what belongs to a presentation data value is handed on as
a memoryview of the caller's own receive buffer, the moment it is there. Only the small association PDUs are collected.

Every PDU starts with the same six bytes::

    offset  length  field
    0       1       PDU-type
    1       1       reserved
    2       4       PDU-length, big endian: bytes that follow

Text fields are read leniently (AE titles padded with NUL, UIDs padded with NUL or space) and written strictly. Items
and sub-items of an unknown type are skipped by their length, as PS3.8 9.3.1 wants.

References
----------
* DICOM PS3.8, 9.3 (DICOM Upper Layer protocol for TCP/IP data units structure)
* DICOM PS3.7, D.3.3 (user information sub-items)
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from xca_imaging.errors import DicomProtocolError

MAX_PDU_LENGTH = 131072
"""What we offer as maximum length of a P-DATA-TF: 128 KiB measured best; longer PDUs only ask for longer buffers."""

MAX_ASSOCIATE_LENGTH = 512 * 1024
"""Longest A-ASSOCIATE PDU that is collected: 128 contexts of 50 syntaxes each, plus user identity, need 440 KB."""

# Reason/diagnostic of a service-provider abort (PS3.8 Table 9-26)
ABORT_REASON_NOT_SPECIFIED = 0
ABORT_UNRECOGNIZED_PDU = 1
ABORT_UNEXPECTED_PDU = 2
ABORT_INVALID_PDU_PARAMETER = 6

# Result/reason of a presentation context (PS3.8 Table 9-18)
CONTEXT_ACCEPTED = 0
CONTEXT_USER_REJECTION = 1
CONTEXT_NO_REASON = 2
CONTEXT_ABSTRACT_SYNTAX_NOT_SUPPORTED = 3
CONTEXT_TRANSFER_SYNTAXES_NOT_SUPPORTED = 4

_PDU_HEADER = struct.Struct(">BxL")
_PDV_HEADER = struct.Struct(">LBB")
_ITEM_HEADER = struct.Struct(">BxH")
_P_DATA_HEADER = struct.Struct(">BxLLBB")
_HEADER_LENGTH = 6  # of a PDU and, by luck, of a PDV too

_P_DATA_TF = 0x04
_CONTROL_COMMAND = 0x01  # message control header (PS3.8 E.2): bit 0 command, bit 1 last fragment
_CONTROL_LAST = 0x02
_SHORTEST_FRAGMENT = 10  # bytes of a fragment that we write even to a peer that announces less than 16


def _text(data: memoryview) -> str:
    """Return an AE title, UID or name without its padding (space, or NUL as some write it)."""
    return bytes(data).decode("latin-1").strip("\0 ")


def _ae_title(title: str) -> bytes:
    return title.encode("latin-1", "replace")[:16].ljust(16)


def _item(item_type: int, content: bytes) -> bytes:
    return _ITEM_HEADER.pack(item_type, len(content)) + content


def _pdu(pdu_type: int, content: bytes) -> bytes:
    return _PDU_HEADER.pack(pdu_type, len(content)) + content


def _items(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Yield (type, content) of the items or sub-items that fill `data`.

    ::

        offset  length  field
        0       1       item-type
        1       1       reserved
        2       2       item-length, big endian
        4       n       content
    """
    position, end = 0, len(data)
    while position < end:
        if end - position < _ITEM_HEADER.size:
            raise DicomProtocolError("item header cut short (PS3.8 9.3)", ABORT_INVALID_PDU_PARAMETER)
        item_type, length = _ITEM_HEADER.unpack_from(data, position)
        position += _ITEM_HEADER.size
        if length > end - position:
            raise DicomProtocolError(
                f"item 0x{item_type:02x} of {length} bytes where {end - position} are left (PS3.8 9.3)",
                ABORT_INVALID_PDU_PARAMETER,
            )
        yield item_type, data[position : position + length]
        position += length


def _need(data: memoryview, length: int, what: str) -> memoryview:
    if len(data) < length:
        raise DicomProtocolError(f"{what} has {len(data)} bytes, needs {length}", ABORT_INVALID_PDU_PARAMETER)
    return data


# --------------------------------------------------------------------------------------------------------------------
# Items of A-ASSOCIATE-RQ and A-ASSOCIATE-AC
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PresentationContext:
    """A proposed presentation context (PS3.8 9.3.2.2).

    ::

        offset  length  field
        0       1       presentation-context-ID, odd
        1       3       reserved
        4       n       one abstract syntax item (30H), one or more transfer syntax items (40H)
    """

    context_id: int
    abstract_syntax: str
    transfer_syntaxes: tuple[str, ...]

    def encode(self) -> bytes:
        syntaxes = b"".join(_item(0x40, uid.encode("latin-1")) for uid in self.transfer_syntaxes)
        abstract = _item(0x30, self.abstract_syntax.encode("latin-1"))
        return _item(0x20, struct.pack(">B3x", self.context_id) + abstract + syntaxes)

    @classmethod
    def decode(cls, data: memoryview) -> PresentationContext:
        _need(data, 4, "presentation context item")
        abstract_syntax, transfer_syntaxes = "", []
        for item_type, content in _items(data[4:]):
            if item_type == 0x30:
                abstract_syntax = _text(content)
            elif item_type == 0x40:
                transfer_syntaxes.append(_text(content))
        return cls(data[0], abstract_syntax, tuple(transfer_syntaxes))


@dataclass(frozen=True, slots=True)
class PresentationContextResult:
    """The answer to one presentation context (PS3.8 9.3.3.2); the transfer syntax counts only when accepted.

    ::

        offset  length  field
        0       1       presentation-context-ID
        1       1       reserved
        2       1       result/reason (Table 9-18)
        3       1       reserved
        4       n       one transfer syntax item (40H)
    """

    context_id: int
    result: int
    transfer_syntax: str

    def encode(self) -> bytes:
        syntax = _item(0x40, self.transfer_syntax.encode("latin-1"))
        return _item(0x21, struct.pack(">BxBx", self.context_id, self.result) + syntax)

    @classmethod
    def decode(cls, data: memoryview) -> PresentationContextResult:
        _need(data, 4, "presentation context result item")
        transfer_syntax = ""
        for item_type, content in _items(data[4:]):
            if item_type == 0x40:
                transfer_syntax = _text(content)
        return cls(data[0], data[2], transfer_syntax)


@dataclass(frozen=True, slots=True)
class RoleSelection:
    """SCP/SCU role selection of one SOP class (PS3.7 D.3.3.4).

    ::

        offset  length  field
        0       2       UID-length n, big endian
        2       n       SOP-class-UID
        2+n     1       SCU-role
        3+n     1       SCP-role
    """

    sop_class_uid: str
    scu_role: bool
    scp_role: bool

    def encode(self) -> bytes:
        uid = self.sop_class_uid.encode("latin-1")
        return _item(0x54, struct.pack(">H", len(uid)) + uid + bytes((self.scu_role, self.scp_role)))

    @classmethod
    def decode(cls, data: memoryview) -> RoleSelection:
        _need(data, 4, "role selection sub-item")
        length = (data[0] << 8) | data[1]
        _need(data, 4 + length, "role selection sub-item")
        return cls(_text(data[2 : 2 + length]), data[2 + length] == 1, data[3 + length] == 1)


@dataclass(frozen=True, slots=True)
class UserInformation:
    """What we read and write of the user information item (PS3.8 9.3.2.3, PS3.7 D.3.3).

    Sub-items that we do not act upon (extended negotiation, user identity, ...) are skipped. A maximum length of 0
    means that the peer names no limit.

    ::

        type  content                                                     section
        51H   maximum-length-received, 4 bytes big endian                 PS3.8 D.1
        52H   implementation-class-UID                                    PS3.7 D.3.3.2.1
        53H   maximum number of operations invoked, performed (2 x 2)     PS3.7 D.3.3.3
        54H   SCP/SCU role selection                                      PS3.7 D.3.3.4
        55H   implementation-version-name                                 PS3.7 D.3.3.2.3
    """

    maximum_length: int = 0
    implementation_class_uid: str = ""
    implementation_version_name: str = ""
    role_selections: tuple[RoleSelection, ...] = ()
    asynchronous_operations_window: tuple[int, int] | None = None

    def encode(self) -> bytes:
        content = [_item(0x51, struct.pack(">L", self.maximum_length))]
        content.append(_item(0x52, self.implementation_class_uid.encode("latin-1")))
        if self.asynchronous_operations_window is not None:
            content.append(_item(0x53, struct.pack(">HH", *self.asynchronous_operations_window)))
        content.extend(role.encode() for role in self.role_selections)
        if self.implementation_version_name:
            content.append(_item(0x55, self.implementation_version_name.encode("latin-1")))
        return _item(0x50, b"".join(content))

    @classmethod
    def decode(cls, data: memoryview) -> UserInformation:
        maximum_length, class_uid, version_name = 0, "", ""
        window: tuple[int, int] | None = None
        roles: list[RoleSelection] = []
        for item_type, content in _items(data):
            if item_type == 0x51:
                maximum_length = int.from_bytes(_need(content, 4, "maximum length sub-item")[:4], "big")
            elif item_type == 0x52:
                class_uid = _text(content)
            elif item_type == 0x53:
                invoked, performed = struct.unpack_from(">HH", _need(content, 4, "asynchronous window sub-item"))
                window = (invoked, performed)
            elif item_type == 0x54:
                roles.append(RoleSelection.decode(content))
            elif item_type == 0x55:
                version_name = _text(content)
        return cls(maximum_length, class_uid, version_name, tuple(roles), window)


# --------------------------------------------------------------------------------------------------------------------
# The seven PDUs
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AssociateRQ:
    """A-ASSOCIATE-RQ (PS3.8 9.3.2).

    ::

        offset  length  field
        0       6       PDU header, type 01H
        6       2       protocol-version, bit 0 is version 1
        8       2       reserved
        10      16      called-AE-title
        26      16      calling-AE-title
        42      32      reserved
        74      n       application context item (10H), presentation context items (20H), user information item (50H)
    """

    called_ae_title: str
    calling_ae_title: str
    application_context: str
    presentation_contexts: tuple[PresentationContext, ...]
    user_information: UserInformation
    protocol_version: int = 1

    pdu_type: ClassVar[int] = 0x01

    def encode(self) -> bytes:
        return _encode_associate(self)

    @classmethod
    def decode(cls, data: memoryview) -> AssociateRQ:
        """Return the PDU whose content, without the PDU header, is `data`."""
        fields, items = _decode_associate(data, "A-ASSOCIATE-RQ", context_item=0x20)
        contexts: dict[int, PresentationContext] = {}
        for context in map(PresentationContext.decode, items):
            if context.context_id % 2 == 0 or context.context_id in contexts:
                raise DicomProtocolError(
                    f"presentation context id {context.context_id} is even or there twice (PS3.8 9.3.2.2)",
                    ABORT_INVALID_PDU_PARAMETER,
                )
            contexts[context.context_id] = context
        return cls(*fields[:3], tuple(contexts.values()), *fields[3:])


@dataclass(frozen=True, slots=True)
class AssociateAC:
    """A-ASSOCIATE-AC (PS3.8 9.3.3): the layout of A-ASSOCIATE-RQ with type 02H and context results (21H).

    The AE title fields repeat those of the request and are not to be tested by the requester.
    """

    called_ae_title: str
    calling_ae_title: str
    application_context: str
    presentation_contexts: tuple[PresentationContextResult, ...]
    user_information: UserInformation
    protocol_version: int = 1

    pdu_type: ClassVar[int] = 0x02

    def encode(self) -> bytes:
        return _encode_associate(self)

    @classmethod
    def decode(cls, data: memoryview) -> AssociateAC:
        """Return the PDU whose content, without the PDU header, is `data`."""
        fields, items = _decode_associate(data, "A-ASSOCIATE-AC", context_item=0x21)
        return cls(*fields[:3], tuple(map(PresentationContextResult.decode, items)), *fields[3:])


def _encode_associate(pdu: AssociateRQ | AssociateAC) -> bytes:
    fixed = struct.pack(
        ">H2x16s16s32x", pdu.protocol_version, _ae_title(pdu.called_ae_title), _ae_title(pdu.calling_ae_title)
    )
    contexts = b"".join(context.encode() for context in pdu.presentation_contexts)
    application = _item(0x10, pdu.application_context.encode("latin-1"))
    return _pdu(pdu.pdu_type, fixed + application + contexts + pdu.user_information.encode())


def _decode_associate(
    data: memoryview, name: str, context_item: int
) -> tuple[tuple[str, str, str, UserInformation, int], list[memoryview]]:
    """Return what both have, in the order of their fields without the contexts, and the contexts' items."""
    _need(data, 68, name)
    application_context, user_information = "", UserInformation()
    contexts: list[memoryview] = []
    for item_type, content in _items(data[68:]):
        if item_type == 0x10:
            application_context = _text(content)
        elif item_type == context_item:
            contexts.append(content)
        elif item_type == 0x50:
            user_information = UserInformation.decode(content)
    version = (data[0] << 8) | data[1]
    return (_text(data[4:20]), _text(data[20:36]), application_context, user_information, version), contexts


@dataclass(frozen=True, slots=True)
class AssociateRJ:
    """A-ASSOCIATE-RJ (PS3.8 9.3.4).

    ::

        offset  length  field
        0       6       PDU header, type 03H
        6       1       reserved
        7       1       result: 1 permanent, 2 transient
        8       1       source: 1 service-user, 2 service-provider (ACSE), 3 service-provider (presentation)
        9       1       reason/diagnostic (Table 9-21)
    """

    result: int
    source: int
    reason: int

    pdu_type: ClassVar[int] = 0x03

    def encode(self) -> bytes:
        return _pdu(self.pdu_type, bytes((0, self.result, self.source, self.reason)))

    @classmethod
    def decode(cls, data: memoryview) -> AssociateRJ:
        _need(data, 4, "A-ASSOCIATE-RJ")
        return cls(data[1], data[2], data[3])


@dataclass(frozen=True, slots=True)
class ReleaseRQ:
    """A-RELEASE-RQ (PS3.8 9.3.6): type 05H and four reserved bytes."""

    pdu_type: ClassVar[int] = 0x05

    def encode(self) -> bytes:
        return _pdu(self.pdu_type, bytes(4))

    @classmethod
    def decode(cls, data: memoryview) -> ReleaseRQ:
        _need(data, 4, "A-RELEASE-RQ")
        return cls()


@dataclass(frozen=True, slots=True)
class ReleaseRP:
    """A-RELEASE-RP (PS3.8 9.3.7): type 06H and four reserved bytes."""

    pdu_type: ClassVar[int] = 0x06

    def encode(self) -> bytes:
        return _pdu(self.pdu_type, bytes(4))

    @classmethod
    def decode(cls, data: memoryview) -> ReleaseRP:
        _need(data, 4, "A-RELEASE-RP")
        return cls()


@dataclass(frozen=True, slots=True)
class Abort:
    """A-ABORT (PS3.8 9.3.8).

    ::

        offset  length  field
        0       6       PDU header, type 07H
        6       2       reserved
        8       1       source: 0 service-user, 2 service-provider
        9       1       reason/diagnostic (Table 9-26), 0 when the source is the service-user
    """

    source: int
    reason: int = ABORT_REASON_NOT_SPECIFIED

    pdu_type: ClassVar[int] = 0x07

    def encode(self) -> bytes:
        return _pdu(self.pdu_type, bytes((0, 0, self.source, self.reason)))

    @classmethod
    def decode(cls, data: memoryview) -> Abort:
        _need(data, 4, "A-ABORT")
        return cls(data[2], data[3])


class Fragment(NamedTuple):
    """A piece of a presentation data value of a P-DATA-TF (PS3.8 9.3.5).

    ::

        offset  length  field
        0       6       PDU header, type 04H
        then, once or more:
        0       4       item-length n, big endian: context id, control header and data
        4       1       presentation-context-ID
        5       1       message control header (E.2): bit 0 command, bit 1 last fragment
        6       n-2     command set or data set bytes

    A value may come as several fragments, since it is handed on before it is whole; `is_last` is set on the piece that
    ends the last fragment of the command set or data set. `data` is a view of the buffer given to
    `Reader.receive` and is valid until the next bytes are read into it.
    """

    context_id: int
    is_command: bool
    is_last: bool
    data: memoryview


Pdu = AssociateRQ | AssociateAC | AssociateRJ | ReleaseRQ | ReleaseRP | Abort

_COLLECTED: dict[int, type[Pdu]] = {
    cls.pdu_type: cls for cls in (AssociateRQ, AssociateAC, AssociateRJ, ReleaseRQ, ReleaseRP, Abort)
}
_FIXED_LENGTH = 4  # of A-ASSOCIATE-RJ, A-RELEASE-RQ, A-RELEASE-RP and A-ABORT


class Reader:
    """Turn received bytes into PDUs and fragments of presentation data.

    Parameters
    ----------
    max_pdu_length : int
        Longest P-DATA-TF that is read. A peer may not go over the length that we announced; one that counts the six
        bytes of the header differently is let through, more is an error.
    max_associate_length : int
        Longest A-ASSOCIATE-RQ or A-ASSOCIATE-AC that is collected in memory.

    Notes
    -----
    After a DicomProtocolError the position in the stream is lost: nothing more may be fed.
    """

    # Mutable state: the PDU or PDV header that is being collected (_header), the association PDU that is being
    # collected (_collecting, _body, _body_length), how much is left of the P-DATA-TF (_pdu_left) and of the
    # presentation data value (_pdv_left), and what that value is (_context_id, _is_command, _is_last).
    __slots__ = (
        "_body",
        "_body_length",
        "_collecting",
        "_context_id",
        "_header",
        "_is_command",
        "_is_last",
        "_max_associate_length",
        "_max_pdu_length",
        "_pdu_left",
        "_pdv_left",
    )

    def __init__(
        self, *, max_pdu_length: int = MAX_PDU_LENGTH, max_associate_length: int = MAX_ASSOCIATE_LENGTH
    ) -> None:
        self._max_pdu_length = max_pdu_length + _HEADER_LENGTH
        self._max_associate_length = max_associate_length
        self._header = bytearray()
        self._collecting: type[Pdu] | None = None
        self._body = bytearray()
        self._body_length = 0
        self._pdu_left = 0
        self._pdv_left = 0
        self._context_id = 0
        self._is_command = False
        self._is_last = False

    @property
    def data_left(self) -> int:
        """Bytes that are still to come of the presentation data value that has begun."""
        return self._pdv_left

    def receive(self, data: memoryview) -> Iterator[Pdu | Fragment]:
        """Yield what `data`, the next bytes of the stream, completes.

        Raises
        ------
        DicomProtocolError
            With the reason/diagnostic of the A-ABORT that answers it.
        """
        position, end = 0, len(data)
        while position < end:
            if self._pdv_left:
                stop = position + self._pdv_left
                if stop > end:
                    self._pdv_left = stop - end
                    yield Fragment(self._context_id, self._is_command, False, data[position:])
                    return
                self._pdv_left = 0
                yield Fragment(self._context_id, self._is_command, self._is_last, data[position:stop])
                position = stop
            elif self._collecting is not None:
                stop = min(end, position + self._body_length - len(self._body))
                self._body += data[position:stop]
                position = stop
                if len(self._body) == self._body_length:
                    decode = self._collecting.decode
                    body, self._body, self._collecting = self._body, bytearray(), None
                    yield decode(memoryview(body))
            elif end - position >= 12 and data[position] == _P_DATA_TF and not self._pdu_left and not self._header:
                # What nearly every read begins with: a P-DATA-TF and its first presentation data value.
                _, pdu_length, length, context_id, control = _P_DATA_HEADER.unpack_from(data, position)
                stop = position + _HEADER_LENGTH + pdu_length
                if 2 < length == pdu_length - 4 <= self._max_pdu_length - 4 and stop <= end:
                    # The value fills the PDU, and is here as a whole: nothing needs to be remembered.
                    is_command, is_last = control & _CONTROL_COMMAND != 0, control & _CONTROL_LAST != 0
                    yield Fragment(context_id, is_command, is_last, data[position + 2 * _HEADER_LENGTH : stop])
                    position = stop
                    continue
                self._start_pdu(data[position : position + _HEADER_LENGTH])
                position += 2 * _HEADER_LENGTH
                if self._start_pdv(data[position - _HEADER_LENGTH : position]):
                    yield Fragment(self._context_id, self._is_command, self._is_last, data[position:position])
            else:
                stop = position + _HEADER_LENGTH - len(self._header)
                if stop > end:
                    self._header += data[position:]
                    return
                header = data[position:stop]
                position = stop
                if self._header:
                    header = memoryview(bytes(self._header) + header)
                    self._header.clear()
                if not self._pdu_left:
                    self._start_pdu(header)
                elif self._start_pdv(header):
                    yield Fragment(self._context_id, self._is_command, self._is_last, data[position:position])

    def receive_value(self, data: memoryview, contexts: frozenset[int]) -> Fragment | None:
        """Return what `receive` would yield, in the case that all large data sets consist of; else None.

        That is more of a data set's value that has begun, with the header of the next PDU or without: `receive` and its
        layers cost a tenth of a read's time. When it returns None, nothing was taken.
        """
        left, length, context_id = self._pdv_left, len(data), self._context_id
        if not left or self._is_command or context_id not in contexts:
            return None
        if length < left:
            self._pdv_left = left - length
            return Fragment(context_id, False, False, data)
        if length == left:
            self._pdv_left = 0
            return Fragment(context_id, False, self._is_last, data)
        if length == left + 2 * _HEADER_LENGTH and not self._pdu_left and not self._is_last:
            pdu_type, pdu_length, pdv_length, next_context, control = _P_DATA_HEADER.unpack_from(data, left)
            if (
                pdu_type == _P_DATA_TF
                and next_context == context_id
                and 2 < pdv_length == pdu_length - 4 <= self._max_pdu_length - 4
                and not control & _CONTROL_COMMAND
            ):
                self._pdv_left, self._is_last = pdv_length - 2, control & _CONTROL_LAST != 0
                return Fragment(context_id, False, False, data[:left])
        return None

    def _start_pdu(self, header: memoryview) -> None:
        pdu_type, length = _PDU_HEADER.unpack(header)
        if pdu_type == _P_DATA_TF:
            if not _HEADER_LENGTH <= length <= self._max_pdu_length:
                raise DicomProtocolError(
                    f"P-DATA-TF of {length} bytes (PS3.8 9.3.5); the limit is {self._max_pdu_length}",
                    ABORT_INVALID_PDU_PARAMETER,
                )
            self._pdu_left = length
            return
        collecting = _COLLECTED.get(pdu_type)
        if collecting is None:
            raise DicomProtocolError(f"PDU type 0x{pdu_type:02x} is unknown (PS3.8 9.3.1)", ABORT_UNRECOGNIZED_PDU)
        limit = self._max_associate_length if collecting in (AssociateRQ, AssociateAC) else _FIXED_LENGTH
        if not _FIXED_LENGTH <= length <= limit:
            raise DicomProtocolError(
                f"PDU type 0x{pdu_type:02x} of {length} bytes (PS3.8 9.3); the limit is {limit}",
                ABORT_INVALID_PDU_PARAMETER,
            )
        self._collecting, self._body_length = collecting, length

    def _start_pdv(self, header: memoryview) -> bool:
        """Take the header of a presentation data value; true when the value is empty and thus ended."""
        length: int
        control: int
        length, self._context_id, control = _PDV_HEADER.unpack(header)
        left_after = self._pdu_left - 4 - length
        # What follows in the PDU must be nothing or at least one more header.
        if length < 2 or left_after < 0 or 0 < left_after < _HEADER_LENGTH:
            raise DicomProtocolError(
                f"presentation data value of {length} bytes where {self._pdu_left - 4} are left (PS3.8 9.3.5.1)",
                ABORT_INVALID_PDU_PARAMETER,
            )
        self._pdu_left = left_after
        self._pdv_left = length - 2
        self._is_command = bool(control & _CONTROL_COMMAND)
        self._is_last = bool(control & _CONTROL_LAST)
        return length == 2


def encode_p_data(context_id: int, data: bytes, *, is_command: bool, max_length: int = 0) -> bytes:
    """Return the P-DATA-TF PDUs that carry one whole command set or data set, one value each.

    Parameters
    ----------
    max_length : int
        Maximum length that the peer announced, 0 for no limit (PS3.8 D.1.1). A peer that leaves less room than ten
        bytes of data gets ten: it would never be answered otherwise.
    """
    control = _CONTROL_COMMAND if is_command else 0
    room = max(max_length - _HEADER_LENGTH, _SHORTEST_FRAGMENT) if max_length else len(data)
    if len(data) <= room:
        length = len(data)
        return _P_DATA_HEADER.pack(_P_DATA_TF, length + 6, length + 2, context_id, control | _CONTROL_LAST) + data
    return b"".join(_fragments(context_id, control, data, room))


def _fragments(context_id: int, control: int, data: bytes, room: int) -> Iterable[bytes]:
    for start in range(0, len(data), room):
        piece = data[start : start + room]
        last = _CONTROL_LAST if start + room >= len(data) else 0
        yield _P_DATA_HEADER.pack(_P_DATA_TF, len(piece) + 6, len(piece) + 2, context_id, control | last) + piece
