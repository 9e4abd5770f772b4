"""DIMSE messages: command sets and the order in which commands and data sets may come.

A command set is Implicit VR Little Endian, whatever the transfer syntax of its presentation context. Its elements all
are of group 0000::

    offset  length  field
    0       2       group 0000H, little endian
    2       2       element, little endian
    4       4       value length n, little endian
    8       n       value

References
----------
* DICOM PS3.7, 6.3 (structure of DIMSE messages), 9.3 (DIMSE-C protocol), E (command dictionary), C (status codes)
* DICOM PS3.8, E.2 (message control header)
"""

from __future__ import annotations

import functools
import re
import struct
from typing import NamedTuple

from xca_imaging.errors import DicomProtocolError
from xca_imaging.wire import pdu

MAX_COMMAND_LENGTH = 16 * 1024
"""Longest command set that is collected: all elements of PS3.7 E.1 at their longest are below 2 KB, but for lists of
attributes (0000,1005) of services that are not ours; 16 KB leave room to answer those properly."""

# Command Field (0000,0100), PS3.7 E.1-1; a response has bit 15 set
C_STORE_RQ = 0x0001
C_GET_RQ = 0x0010
C_FIND_RQ = 0x0020
C_MOVE_RQ = 0x0021
C_ECHO_RQ = 0x0030
C_CANCEL_RQ = 0x0FFF
N_CREATE_RQ = 0x0140
RESPONSE = 0x8000

NO_DATA_SET = 0x0101  # Command Data Set Type (0000,0800); any other value announces a data set
_NO_DATA_SET = b"\x01\x01"

# Status (0000,0900): PS3.7 C, and PS3.4 Table B.2-1 for the Storage Service Class
STATUS_SUCCESS = 0x0000
STATUS_PROCESSING_FAILURE = 0x0110
STATUS_INVALID_SOP_INSTANCE = 0x0117
STATUS_NO_SUCH_SOP_CLASS = 0x0118
STATUS_MISSING_ATTRIBUTE = 0x0120
STATUS_REFUSED_NOT_AUTHORIZED = 0x0124
STATUS_UNRECOGNIZED_OPERATION = 0x0211
STATUS_RESOURCE_LIMITATION = 0x0213
STATUS_OUT_OF_RESOURCES = 0xA700
STATUS_CANNOT_UNDERSTAND = 0xC000

# Elements of group 0000 (PS3.7 E.1)
_GROUP_LENGTH = 0x0000
_AFFECTED_SOP_CLASS_UID = 0x0002
_REQUESTED_SOP_CLASS_UID = 0x0003
_COMMAND_FIELD = 0x0100
_MESSAGE_ID = 0x0110
_MESSAGE_ID_BEING_RESPONDED_TO = 0x0120
_MOVE_DESTINATION = 0x0600
_PRIORITY = 0x0700
_COMMAND_DATA_SET_TYPE = 0x0800
_STATUS = 0x0900
_ERROR_COMMENT = 0x0902
_AFFECTED_SOP_INSTANCE_UID = 0x1000
_REQUESTED_SOP_INSTANCE_UID = 0x1001
_REMAINING_SUBOPERATIONS = 0x1020
_COMPLETED_SUBOPERATIONS = 0x1021
_FAILED_SUBOPERATIONS = 0x1022
_WARNING_SUBOPERATIONS = 0x1023
_MOVE_ORIGINATOR_AE_TITLE = 0x1030
_MOVE_ORIGINATOR_MESSAGE_ID = 0x1031

_ELEMENT = struct.Struct("<HHL")
_US = struct.Struct("<H")
_GROUP = struct.Struct("<HHLL")
_US_ELEMENT = struct.Struct("<HHLH")


class CStoreRequest(NamedTuple):
    """C-STORE-RQ (PS3.7 9.3.1.1)."""

    message_id: int
    affected_sop_class_uid: str
    affected_sop_instance_uid: str
    has_data_set: bool = True
    priority: int = 0
    move_originator_ae_title: str | None = None
    move_originator_message_id: int | None = None


class CEchoRequest(NamedTuple):
    """C-ECHO-RQ (PS3.7 9.3.5.1)."""

    message_id: int
    affected_sop_class_uid: str
    has_data_set: bool = False


class CCancelRequest(NamedTuple):
    """C-CANCEL-RQ of any service (PS3.7 9.3.2.3); there is nothing that it could cancel at a Storage SCP."""

    message_id_being_responded_to: int
    has_data_set: bool = False


class OtherRequest(NamedTuple):
    """A request of any other service; N-CREATE is the only one of them that is offered here."""

    command_field: int
    message_id: int
    sop_class_uid: str
    sop_instance_uid: str
    has_data_set: bool


class Response(NamedTuple):
    """A response of any service (command field with bit 15 set); counters of sub-operations are None where absent."""

    command_field: int
    message_id_being_responded_to: int
    status: int
    affected_sop_class_uid: str
    affected_sop_instance_uid: str
    has_data_set: bool
    error_comment: str = ""
    remaining: int | None = None
    completed: int | None = None
    failed: int | None = None
    warning: int | None = None


Command = CStoreRequest | CEchoRequest | CCancelRequest | OtherRequest | Response


# --------------------------------------------------------------------------------------------------------------------
# Command sets
# --------------------------------------------------------------------------------------------------------------------


def _elements(data: bytes) -> dict[int, bytes]:
    """Return the values of a command set by element number of group 0000."""
    values: dict[int, bytes] = {}
    position, end = 0, len(data)
    unpack = _ELEMENT.unpack_from
    while position < end:
        if end - position < 8:
            raise DicomProtocolError("command element cut short (PS3.7 6.3.1)", pdu.ABORT_INVALID_PDU_PARAMETER)
        group, element, length = unpack(data, position)
        stop = position + 8 + length
        if group or stop > end:
            raise DicomProtocolError(
                f"command element ({group:04x},{element:04x}) of {length} bytes where {end - position - 8} are left "
                "(PS3.7 6.3.1)",
                pdu.ABORT_INVALID_PDU_PARAMETER,
            )
        values[element] = data[position + 8 : stop]
        position = stop
    return values


_STORE = re.compile(
    rb"\x00{4}\x04\x00{3}.{4}"  # group length
    rb"\x00\x00\x02\x00(.)\x00{3}([0-9.]+\x00?)"
    rb"\x00\x00\x00\x01\x02\x00{3}\x01\x00"  # command field: C-STORE-RQ
    rb"\x00\x00\x10\x01\x02\x00{3}(..)"
    rb"\x00\x00\x00\x07\x02\x00{3}(..)"
    rb"\x00\x00\x00\x08\x02\x00{3}(..)"
    rb"\x00\x00\x00\x10(.)\x00{3}([0-9.]+\x00?)"
    rb"(?:\x00\x00\x30\x10(.)\x00{3}([^\x00]{1,16})\x00\x00\x31\x10\x02\x00{3}(..))?",
    re.DOTALL,
)
"""A C-STORE-RQ as nearly every sender writes it. There is one for each object, and element by element it costs three
times as much; whatever looks different in any way is read element by element."""


def _decode_store(data: bytes) -> CStoreRequest | None:
    """Return the C-STORE-RQ that is spelled as usual; None leaves the judgement to others."""
    found = _STORE.fullmatch(data)
    if found is None:
        return None
    class_length, sop_class, message_id, priority, kind, length, instance, title_length, title, moved = found.groups()
    if class_length[0] != len(sop_class) or length[0] != len(instance):
        return None
    if title is not None and title_length[0] != len(title):
        return None
    return CStoreRequest(
        message_id[0] | message_id[1] << 8,
        sop_class.rstrip(b"\0").decode("ascii"),
        instance.rstrip(b"\0").decode("ascii"),
        kind != _NO_DATA_SET,
        priority[0] | priority[1] << 8,
        None if title is None else title.decode("latin-1").strip(" ") or None,
        None if title is None else moved[0] | moved[1] << 8,
    )


def _us(values: dict[int, bytes], element: int, default: int | None = None) -> int:
    value = values.get(element)
    if value is None or len(value) != 2:
        if value is None and default is not None:
            return default
        raise DicomProtocolError(
            f"command element (0000,{element:04x}) is missing or not one US (PS3.7 E.1)",
            pdu.ABORT_INVALID_PDU_PARAMETER,
        )
    return value[0] | value[1] << 8


def _counter(values: dict[int, bytes], element: int) -> int | None:
    """Return a number of sub-operations; one that is no US is as good as none, since nothing may depend on it."""
    value = values.get(element, b"")
    return value[0] | value[1] << 8 if len(value) == 2 else None


def _text(values: dict[int, bytes], element: int) -> str:
    return values.get(element, b"").decode("latin-1").strip("\0 ")


def decode_command(data: bytes) -> Command:
    """Return the command that a whole command set stands for.

    Absent optional elements are None or empty; text is never checked beyond its padding: whether a UID is one is for
    the service to judge, which has a status for it.

    Raises
    ------
    DicomProtocolError
        Not a command set, or one without its command field or message id.
    """
    if (store := _decode_store(data)) is not None:
        return store
    values = _elements(data)
    command_field = _us(values, _COMMAND_FIELD)
    has_data_set = _us(values, _COMMAND_DATA_SET_TYPE, NO_DATA_SET) != NO_DATA_SET
    if command_field == C_STORE_RQ:
        is_moved = _MOVE_ORIGINATOR_MESSAGE_ID in values
        return CStoreRequest(
            _us(values, _MESSAGE_ID),
            _text(values, _AFFECTED_SOP_CLASS_UID),
            _text(values, _AFFECTED_SOP_INSTANCE_UID),
            has_data_set,
            _us(values, _PRIORITY, 0),
            _text(values, _MOVE_ORIGINATOR_AE_TITLE) or None,
            _us(values, _MOVE_ORIGINATOR_MESSAGE_ID) if is_moved else None,
        )
    if command_field == C_ECHO_RQ:
        return CEchoRequest(_us(values, _MESSAGE_ID), _text(values, _AFFECTED_SOP_CLASS_UID), has_data_set)
    if command_field == C_CANCEL_RQ:
        return CCancelRequest(_us(values, _MESSAGE_ID_BEING_RESPONDED_TO, 0), has_data_set)
    sop_class_uid = _text(values, _AFFECTED_SOP_CLASS_UID) or _text(values, _REQUESTED_SOP_CLASS_UID)
    sop_instance_uid = _text(values, _AFFECTED_SOP_INSTANCE_UID) or _text(values, _REQUESTED_SOP_INSTANCE_UID)
    if command_field & RESPONSE:
        message_id, status = _us(values, _MESSAGE_ID_BEING_RESPONDED_TO), _us(values, _STATUS)
        return Response(
            command_field,
            message_id,
            status,
            sop_class_uid,
            sop_instance_uid,
            has_data_set,
            _text(values, _ERROR_COMMENT),
            _counter(values, _REMAINING_SUBOPERATIONS),
            _counter(values, _COMPLETED_SUBOPERATIONS),
            _counter(values, _FAILED_SUBOPERATIONS),
            _counter(values, _WARNING_SUBOPERATIONS),
        )
    return OtherRequest(command_field, _us(values, _MESSAGE_ID), sop_class_uid, sop_instance_uid, has_data_set)


def _encode_us(element: int, value: int) -> bytes:
    return _US_ELEMENT.pack(0, element, 2, value)


def _encode_text(element: int, text: str, padding: bytes) -> bytes:
    value = text.encode("latin-1", "replace")
    if len(value) % 2:
        value += padding
    return _ELEMENT.pack(0, element, len(value)) + value


def _encode_uid(element: int, uid: str) -> bytes:
    return _encode_text(element, uid, b"\0") if uid else b""


def _command_set(elements: bytes) -> bytes:
    return _GROUP.pack(0, _GROUP_LENGTH, 4, len(elements)) + elements


def encode_c_store_request(request: CStoreRequest) -> bytes:
    """Return the command set of C-STORE-RQ."""
    moved = b""
    if request.move_originator_ae_title is not None:
        moved += _encode_text(_MOVE_ORIGINATOR_AE_TITLE, request.move_originator_ae_title, b" ")
    if request.move_originator_message_id is not None:
        moved += _encode_us(_MOVE_ORIGINATOR_MESSAGE_ID, request.move_originator_message_id)
    return _command_set(
        _encode_uid(_AFFECTED_SOP_CLASS_UID, request.affected_sop_class_uid)
        + _encode_us(_COMMAND_FIELD, C_STORE_RQ)
        + _encode_us(_MESSAGE_ID, request.message_id)
        + _encode_us(_PRIORITY, request.priority)
        + _encode_us(_COMMAND_DATA_SET_TYPE, 0x0000 if request.has_data_set else NO_DATA_SET)
        + _encode_uid(_AFFECTED_SOP_INSTANCE_UID, request.affected_sop_instance_uid)
        + moved
    )


def encode_c_echo_request(request: CEchoRequest) -> bytes:
    """Return the command set of C-ECHO-RQ."""
    return _command_set(
        _encode_uid(_AFFECTED_SOP_CLASS_UID, request.affected_sop_class_uid)
        + _encode_us(_COMMAND_FIELD, C_ECHO_RQ)
        + _encode_us(_MESSAGE_ID, request.message_id)
        + _encode_us(_COMMAND_DATA_SET_TYPE, NO_DATA_SET)
    )


def encode_query_request(
    command_field: int, message_id: int, sop_class_uid: str, *, priority: int = 0, move_destination: str = ""
) -> bytes:
    """Return the command set of C-FIND-RQ, C-GET-RQ or C-MOVE-RQ, whose identifier follows as data set.

    Parameters
    ----------
    priority : int
        0 medium, 1 high, 2 low.
    move_destination : str
        AE title, of C-MOVE only.

    References
    ----------
    * DICOM PS3.7, 9.3.2.1 (C-FIND-RQ), 9.3.3.1 (C-GET-RQ), 9.3.4.1 (C-MOVE-RQ)
    """
    destination = _encode_text(_MOVE_DESTINATION, move_destination, b" ") if move_destination else b""
    return _command_set(
        _encode_uid(_AFFECTED_SOP_CLASS_UID, sop_class_uid)
        + _encode_us(_COMMAND_FIELD, command_field)
        + _encode_us(_MESSAGE_ID, message_id)
        + destination
        + _encode_us(_PRIORITY, priority)
        + _encode_us(_COMMAND_DATA_SET_TYPE, 0x0000)
    )


def encode_c_cancel_request(message_id: int) -> bytes:
    """Return the command set of C-CANCEL-RQ for the request with this message id (PS3.7 9.3.2.3)."""
    return _command_set(
        _encode_us(_COMMAND_FIELD, C_CANCEL_RQ)
        + _encode_us(_MESSAGE_ID_BEING_RESPONDED_TO, message_id)
        + _encode_us(_COMMAND_DATA_SET_TYPE, NO_DATA_SET)
    )


def encode_response(
    command_field: int, message_id: int, status: int, sop_class_uid: str = "", sop_instance_uid: str = ""
) -> bytes:
    """Return the command set of a response without data set.

    Parameters
    ----------
    command_field : int
        Of the request that is answered.

    Notes
    -----
    ::

        element      keyword
        (0000,0000)  CommandGroupLength
        (0000,0002)  AffectedSOPClassUID, where there is one
        (0000,0100)  CommandField
        (0000,0120)  MessageIDBeingRespondedTo
        (0000,0800)  CommandDataSetType: none
        (0000,0900)  Status
        (0000,1000)  AffectedSOPInstanceUID, where there is one
    """
    elements = (
        _response_head(command_field, sop_class_uid)
        + _RESPONSE_TAIL.pack(message_id, _NO_DATA_SET_THEN_STATUS, status)
        + _encode_uid(_AFFECTED_SOP_INSTANCE_UID, sop_instance_uid)
    )
    return _GROUP.pack(0, _GROUP_LENGTH, 4, len(elements)) + elements


@functools.lru_cache(maxsize=64)  # the services and classes of the associations at work; an entry is 100 bytes
def _response_head(command_field: int, sop_class_uid: str) -> bytes:
    """Return what is the same for all responses of a SOP class, up to the value of (0000,0120)."""
    return (
        _encode_uid(_AFFECTED_SOP_CLASS_UID, sop_class_uid)
        + _encode_us(_COMMAND_FIELD, command_field | RESPONSE)
        + _ELEMENT.pack(0, _MESSAGE_ID_BEING_RESPONDED_TO, 2)
    )


_NO_DATA_SET_THEN_STATUS = _encode_us(_COMMAND_DATA_SET_TYPE, NO_DATA_SET) + _ELEMENT.pack(0, _STATUS, 2)
_RESPONSE_TAIL = struct.Struct(f"<H{len(_NO_DATA_SET_THEN_STATUS)}sH")


# --------------------------------------------------------------------------------------------------------------------
# Messages
# --------------------------------------------------------------------------------------------------------------------


class MessageReader:
    """Put commands together and watch that each data set follows its command.

    Parameters
    ----------
    max_command_length : int
        Longest command set that is collected.

    Attributes
    ----------
    data_set_context : int
        The context whose data set is due; 0 is no context, since context ids are odd.
    """

    # Mutable state: command fragments so far (_command), the context they came in; and data_set_context.
    __slots__ = ("_command", "_command_context", "_max_command_length", "data_set_context")

    def __init__(self, *, max_command_length: int = MAX_COMMAND_LENGTH) -> None:
        self._max_command_length = max_command_length
        self._command = bytearray()
        self._command_context = 0
        self.data_set_context = 0

    @property
    def is_idle(self) -> bool:
        """True between messages."""
        return not self.data_set_context and not self._command_context

    def receive(self, fragment: pdu.Fragment) -> Command | None:
        """Return the command that the fragment completes; None for data set fragments and incomplete commands.

        A data set fragment that is passed without error belongs to the last command returned.

        Raises
        ------
        DicomProtocolError
            A command in the midst of a data set, a data set without command, a change of context in a message, a
            command set that is too long or no command set at all.
        """
        if not fragment.is_command:
            if fragment.context_id != self.data_set_context:
                raise DicomProtocolError(
                    f"data set in context {fragment.context_id} without its command (PS3.7 6.3.1)",
                    pdu.ABORT_UNEXPECTED_PDU,
                )
            if fragment.is_last:
                self.data_set_context = 0
            return None
        if self.data_set_context or self._command_context not in (0, fragment.context_id):
            raise DicomProtocolError("command amidst another message (PS3.7 6.3.1)", pdu.ABORT_UNEXPECTED_PDU)
        if len(self._command) + len(fragment.data) > self._max_command_length:
            raise DicomProtocolError(
                f"command set of more than {self._max_command_length} bytes", pdu.ABORT_INVALID_PDU_PARAMETER
            )
        if not fragment.is_last:
            self._command += fragment.data
            self._command_context = fragment.context_id
            return None
        data = bytes(fragment.data)
        if self._command:
            data = bytes(self._command) + data
            self._command.clear()
        self._command_context = 0
        command = decode_command(data)
        if command.has_data_set:
            self.data_set_context = fragment.context_id
        return command
