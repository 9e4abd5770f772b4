"""ITI-8 Patient Identity Feed in HL7 v2: ADT messages to what they say, and acknowledgements.

Of an ADT message a registry needs the patient's identifiers: PID-3, and MRG-1 of a merge. Demographics are neither
checked nor kept. Identifiers without the OID of their assigning authority are passed over: XDS knows no others.

References
----------
* IHE ITI TF-2, 3.8.4.1 (A01, A04, A05, A08), 3.8.4.2 (A40); C.2.2 (acknowledgement modes), C.2.3 (MSH, MSA, ERR)
* HL7 v2.5: 2.9.2 (original mode), 2.15.5 (ERR), 2.15.9 (MSH); tables 0008, 0211, 0357
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import hl7

from xca_imaging.errors import MalformedMessage
from xca_imaging.transactions.identity_feed import (
    Added,
    Feed,
    FeedMessage,
    FeedRefused,
    Merged,
    Revised,
    is_usable,
    patient_id_of,
)

EVENTS: Final = ("A01", "A04", "A05", "A08", "A40")

AckCode = Literal["AA", "AE", "AR"]
"""HL7 table 0008: taken; not taken, for what it says; not taken, for what it is or because we cannot now."""

_ERRORS = {  # HL7 table 0357
    100: "Segment sequence error",
    101: "Required field missing",
    102: "Data type error",
    103: "Table value not found",
    200: "Unsupported message type",
    201: "Unsupported event code",
    203: "Unsupported version id",
    204: "Unknown key identifier",
    207: "Application internal error",
}
_CHARACTER_SETS = {  # HL7 table 0211, as codecs
    "ASCII": "ascii",
    "ISO IR6": "ascii",
    **{f"8859/{part}": f"iso8859-{part}" for part in (1, 2, 3, 4, 5, 6, 7, 8, 9, 15)},
    "ISO IR14": "shift_jis",
    "ISO IR87": "iso2022_jp",
    "ISO IR159": "iso2022_jp_1",
    "GB 18030-2000": "gb18030",
    "KS X 1001": "euc_kr",
    "BIG-5": "big5",
    "UNICODE UTF-8": "utf-8",
}
_MAX_SEGMENT = 16 * 1024  # characters of PID or MRG: a hundred identifiers, names and addresses have half of it
_MAX_IDS = 100  # identifiers of one patient: real feeds have a handful


class NotAccepted(FeedRefused):
    """An HL7 v2 message that is not taken: what its acknowledgement says.

    Parameters
    ----------
    code : str
        `AE` or `AR`.
    error : int
        HL7 table 0357.
    location : str
        Segment, its number and the field (ERR-2): `PID^1^3`.
    """

    def __init__(self, code: AckCode, error: int, text: str, location: str = "") -> None:
        self.code, self.error, self.location = code, error, location
        super().__init__(text)


@dataclass(frozen=True, slots=True)
class Header:
    """MSH of a message: what its acknowledgement needs, and the codec of its text.

    `delimiters` are MSH-1 and MSH-2: field, component, repetition, escape, subcomponent. `codec` is empty where the
    message does not say, None where it names a character set that we do not know.
    """

    delimiters: str
    sending_application: str
    sending_facility: str
    receiving_application: str
    receiving_facility: str
    message_type: str
    event: str
    message_id: str
    processing_id: str
    version: str
    codec: str | None


def decode_header(data: bytes) -> Header:
    """Return the header of a message; whatever is wrong behind it can then be answered.

    Raises
    ------
    MalformedMessage
        There is none: nobody can be answered.
    """
    line = re.split(b"[\r\n]", data, maxsplit=1)[0]
    if not line.startswith(b"MSH") or len(line) < 8 or not _are_delimiters(line[3:8]):
        raise MalformedMessage("an HL7 v2 message begins with MSH and its delimiters")
    # The header is ASCII but for names of applications; a byte for a character is enough to find MSH-18.
    fields = line.decode("latin-1").split(chr(line[3]))
    component, repetition = chr(line[4]), chr(line[5])

    def field(number: int) -> str:
        return fields[number - 1].strip() if len(fields) >= number else ""

    message_type, _, rest = field(9).partition(component)
    declared = field(18).split(repetition)[0].strip().upper()
    return Header(
        delimiters=line[3:8].decode("latin-1"),
        sending_application=field(3),
        sending_facility=field(4),
        receiving_application=field(5),
        receiving_facility=field(6),
        message_type=message_type,
        event=rest.partition(component)[0],
        message_id=field(10),
        processing_id=field(11).partition(component)[0],
        version=field(12).partition(component)[0],
        codec=_CHARACTER_SETS.get(declared) if declared else "",
    )


def _are_delimiters(characters: bytes) -> bool:
    """Whether MSH-1 and MSH-2 can be what they should be: five characters, none of them twice."""
    return len(set(characters)) == 5 and not any(chr(each).isalnum() or each < 0x20 for each in characters)


def decode_message(header: Header, data: bytes) -> FeedMessage:
    """Return what a message says.

    Raises
    ------
    NotAccepted
        It is none of the feed's, or lacks what the feed needs.
    """
    if not header.message_id:
        raise NotAccepted("AR", 101, "no message control id", "MSH^1^10")
    if header.version and not header.version.startswith("2."):
        raise NotAccepted("AR", 203, f"version {header.version[:20]} is not HL7 v2", "MSH^1^12")
    if header.message_type != "ADT":
        raise NotAccepted("AR", 200, f"message type {header.message_type[:20]} is not ADT", "MSH^1^9")
    if header.event not in EVENTS:
        raise NotAccepted("AR", 201, f"event {header.event[:20]} is none of {', '.join(EVENTS)}", "MSH^1^9")
    lines = re.split("[\r\n]+", _text(header, data))
    patient_ids = _identifiers(_segment(lines, "PID", header.delimiters), 3, header.delimiters)
    feed: Feed
    if header.event == "A40":
        subsumed = _identifiers(_segment(lines, "MRG", header.delimiters), 1, header.delimiters)
        feed = Merged(patient_ids, subsumed)
    else:
        feed = Revised(patient_ids) if header.event == "A08" else Added(patient_ids)
    return FeedMessage(header.message_id, feed)


def _text(header: Header, data: bytes) -> str:
    if header.codec is None:
        raise NotAccepted("AR", 103, "a character set that is not supported", "MSH^1^18")
    try:
        if header.codec:
            return data.decode(header.codec)
        # Undeclared means ASCII. Senders that forget to say so send UTF-8 or Latin-1; identifiers are the same in all.
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return data.decode("latin-1")
    except UnicodeDecodeError:
        raise NotAccepted("AR", 102, "text that is not in the character set of MSH-18") from None


def _segment(lines: Sequence[str], name: str, delimiters: str) -> hl7.Segment:
    """Return the segment of that name; a feed tells of one patient at a time.

    The others are not parsed: they may be many and long, with a picture of the patient among them.
    """
    found = [line for line in lines if line.startswith(name + delimiters[0])]
    if len(found) != 1:
        raise NotAccepted("AE", 100, f"{len(found)} {name} segments instead of one", name)
    if len(found[0]) > _MAX_SEGMENT:
        raise NotAccepted("AE", 102, f"{name} has more than {_MAX_SEGMENT} characters", name)
    try:
        return hl7.parse(f"MSH{delimiters}\r{found[0]}\r")[1]
    except (hl7.HL7Exception, IndexError, KeyError, ValueError) as exc:
        raise NotAccepted("AE", 102, f"{name} is not an HL7 v2 segment", name) from exc


def _identifiers(segment: hl7.Segment, number: int, delimiters: str) -> tuple[str, ...]:
    name = str(segment[0])
    repetitions = list(segment[number]) if len(segment) > number else []
    if len(repetitions) > _MAX_IDS:
        raise NotAccepted("AE", 102, f"more than {_MAX_IDS} identifiers", f"{name}^1^{number}")
    found: dict[str, None] = {}
    for repetition in repetitions:
        authority, authority_type = _part(repetition, 4, 2), _part(repetition, 4, 3)
        patient_id = patient_id_of(_unescaped(_part(repetition, 1, 1), delimiters), authority)
        if authority_type in ("ISO", "") and is_usable(patient_id):
            found[patient_id] = None
    if not found:
        text = f"{name}-{number} has no identifier with the OID of its assigning authority"
        given = any(str(each).strip() for each in repetitions)
        raise NotAccepted("AE", 204 if given else 101, text, f"{name}^1^{number}")
    return tuple(found)


def _part(repetition: Any, component: int, subcomponent: int) -> str:
    """Return a subcomponent as it stands, empty where there is none; what has no parts is its own first part."""
    part = repetition
    for number in (component, subcomponent):
        if isinstance(part, str):
            part = part if number == 1 else ""
        else:
            part = part[number - 1] if len(part) >= number else ""
    return str(part).strip()


def _unescaped(text: str, delimiters: str) -> str:
    """Return a value without the escapes of its delimiters (HL7 v2.5, 2.7.1); other sequences stay as they are.

    Not the library's `unescape`: it writes the text of a wrong sequence into the log.
    """
    field, component, repetition, escape, subcomponent = (delimiters[index] for index in range(5))
    characters = {"F": field, "S": component, "R": repetition, "E": escape, "T": subcomponent}
    sequence = re.compile(f"{re.escape(escape)}([FSRET]){re.escape(escape)}")
    return sequence.sub(lambda found: characters[found[1]], text)


def encode_acknowledgement(header: Header, *, control_id: str, time: str, problem: NotAccepted | None = None) -> bytes:
    """Return the acknowledgement of a message: AA, or what is wrong with it.

    Parameters
    ----------
    control_id : str
        MSH-10 of the acknowledgement, at most 20 characters.
    time : str
        HL7 v2 TS: MSH-7.
    """
    field, component, subcomponent = header.delimiters[0], header.delimiters[1], header.delimiters[4]
    message_type = component.join(("ACK", header.event, "ACK")) if header.event else "ACK"
    version = header.version or "2.3.1"
    rows: list[list[str]] = [
        [
            "MSH",
            header.delimiters[1:],
            header.receiving_application,
            header.receiving_facility,
            header.sending_application,
            header.sending_facility,
            time,
            "",
            message_type,
            control_id,
            header.processing_id or "P",
            version,
        ]
    ]
    if problem is None:
        rows.append(["MSA", "AA", header.message_id])
    else:
        text = "".join(" " if each in header.delimiters or each < " " else each for each in str(problem))
        rows.append(["MSA", problem.code, header.message_id, text])
        error, meaning, location = str(problem.error), _ERRORS[problem.error], problem.location.split("^")
        # ERR-1 alone until 2.4, where it holds the code as subcomponents; from 2.5 on fields of their own.
        if version.startswith(("2.1", "2.2", "2.3", "2.4")):
            code = subcomponent.join((error, meaning, "HL70357"))
            rows.append(["ERR", component.join((*location, *[""] * (3 - len(location)), code))])
        else:
            code = component.join((error, meaning, "HL70357"))
            rows.append(["ERR", "", component.join(location), code, "E", "", "", "", text])
    # What was read of the header byte by byte goes back byte by byte; our own text is ASCII.
    return "".join(field.join(row) + "\r" for row in rows).encode("latin-1", "replace")
