"""Minimal Lower Layer Protocol: HL7 v2 messages in a stream of bytes. No sockets, no clock.

    <SB> message <EB> <CR>      SB = 0x0B, EB = 0x1C, CR = 0x0D

What stands between two messages is not part of any: line ends are common there and passed over, anything else breaks
the protocol. Sender and receiver may have fallen out of step, and guessing where the next message begins could tear
one message into two.

References
----------
* HL7: Transport Specification MLLP, Release 1, 2 (block format); IHE ITI TF-2, C.2.1 (HL7 v2 over MLLP)
"""

from __future__ import annotations

from xca_imaging.errors import MessageTooLarge, RemoteProtocolError

START, END, CARRIAGE_RETURN = 0x0B, 0x1C, 0x0D
_BETWEEN = b"\r\n"


class Reader:
    """Takes bytes as they come and gives whole messages.

    Parameters
    ----------
    max_message : int
        Bytes of one message. An ADT message has a few KB; with an embedded picture a few hundred.
    """

    # Mutable state: the message that has begun, whether one has, and whether its EB has come.

    def __init__(self, *, max_message: int = 1024 * 1024) -> None:
        self._max_message = max_message
        self._message = bytearray()
        self._inside = False

    @property
    def is_inside(self) -> bool:
        """Whether a message has begun and not ended: the peer owes bytes."""
        return self._inside

    def receive(self, data: bytes) -> list[bytes]:
        """Return the messages that end in `data`, without their frame.

        Raises
        ------
        MessageTooLarge
            A message is longer than `max_message`.
        RemoteProtocolError
            Bytes outside of a block.
        """
        messages: list[bytes] = []
        rest = memoryview(data)
        while rest:
            rest = self._inner(rest, messages) if self._inside else self._outer(rest)
        return messages

    def _outer(self, data: memoryview) -> memoryview:
        for index, byte in enumerate(data):
            if byte == START:
                self._inside = True
                return data[index + 1 :]
            if byte not in _BETWEEN:
                raise RemoteProtocolError(f"byte 0x{byte:02x} outside of an MLLP block")
        return data[len(data) :]

    def _inner(self, data: memoryview, messages: list[bytes]) -> memoryview:
        # EB ends a message without waiting for its CR: some senders leave it out, and a CR is passed over outside.
        # Neither EB nor SB occurs in a message: the characters of HL7's character sets are 0x20 and above, beside CR.
        content = data.tobytes()
        end = content.find(END)
        size = len(content) if end < 0 else end
        if len(self._message) + size > self._max_message:
            raise MessageTooLarge(f"an HL7 message of more than {self._max_message} bytes")
        self._message += content[:size]
        if end < 0:
            return data[len(data) :]
        messages.append(bytes(self._message))
        self._message.clear()
        self._inside = False
        return data[end + 1 :]


def frame(message: bytes) -> bytes:
    """Return a message as one block."""
    return bytes((START,)) + message + bytes((END, CARRIAGE_RETURN))
