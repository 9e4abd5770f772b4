"""ITI-8: ADT messages as the standard writes them, as another library writes them, and odd ones; acknowledgements."""

from __future__ import annotations

import hl7
import pytest
from hl7apy.core import Message
from hypothesis import given
from hypothesis import strategies as st

from xca_imaging.errors import MalformedMessage
from xca_imaging.transactions import iti8
from xca_imaging.transactions.identity_feed import Added, Feed, FeedMessage, Merged, Revised

AUTHORITY = "1.3.6.1.4.1.21367.2005.13.20.1000"
PATIENT = f"test-1^^^&{AUTHORITY}&ISO"
SUBSUMED = f"test-2^^^&{AUTHORITY}&ISO"

# The form of the examples in HL7 v2.3.1 chapter 3 and of the Connectathon's feeds.
ADMIT = (
    "MSH|^~\\&|ADT1|MCM|REGISTRY|XDS|20240229101500||ADT^A01^ADT_A01|MSG00001|P|2.3.1||||||\r"
    "EVN|A01|20240229101500||\r"
    f"PID|||test-1^^^WEST&{AUTHORITY}&ISO||SAMPLE^ADA^^^^^L||19610615|F||2106-3|1200 N ELM STREET^^GREENSBORO^NC\r"
    "NK1|1|SAMPLE^BARBARA^K|SPO|||||20011105\r"
    "PV1|1|I|2000^2012^01||||004777^LEBAUER^SIDNEY^J.|||SUR||-||1|A0-\r"
)
MERGE = (
    "MSH|^~\\&|ADT1|MCM|REGISTRY|XDS|20240229101500||ADT^A40^ADT_A39|MSG00002|P|2.3.1\r"
    "EVN|A40|20240229101500\r"
    f"PID|||test-1^^^&{AUTHORITY}&ISO||SAMPLE^ADA\r"
    f"MRG|test-2^^^&{AUTHORITY}&ISO\r"
)


def read(text: str | bytes) -> FeedMessage:
    data = text if isinstance(text, bytes) else text.encode()
    return iti8.decode_message(iti8.decode_header(data), data)


def acknowledged(text: str | bytes, problem: iti8.NotAccepted | None = None) -> hl7.Message:
    data = text if isinstance(text, bytes) else text.encode()
    header = iti8.decode_header(data)
    answer = iti8.encode_acknowledgement(header, control_id="ACK1", time="20240229101501", problem=problem)
    return hl7.parse(answer.decode("latin-1"))


@pytest.mark.parametrize("event", ["A01", "A04", "A05", "A08"])
def test_admissions_and_updates(event):
    expected = Revised if event == "A08" else Added
    assert read(ADMIT.replace("A01", event)) == FeedMessage("MSG00001", expected((PATIENT,)))


def test_a_merge():
    assert read(MERGE) == FeedMessage("MSG00002", Merged((PATIENT,), (SUBSUMED,)))


@pytest.mark.parametrize("event", ["A01", "A08", "A40"])
def test_messages_of_another_library(event):
    structure = {"A01": "ADT_A01", "A08": "ADT_A01", "A40": "ADT_A39"}[event]
    message = Message(structure, version="2.5")
    message.msh.msh_3, message.msh.msh_4 = "HL7APY", "TEST"
    message.msh.msh_9 = f"ADT^{event}^{structure}"
    message.msh.msh_10, message.msh.msh_11 = "17", "P"
    message.evn.evn_2 = "20240229101500"
    group = message.add_group("adt_a39_patient") if event == "A40" else message
    group.add_segment("PID").value = f"PID|||test-1^^^WEST&{AUTHORITY}&ISO~other^^^&1.2.3&ISO||Sample^Ada"
    if event == "A40":
        group.add_segment("MRG").value = f"MRG|test-2^^^&{AUTHORITY}&ISO"
    ids = (PATIENT, "other^^^&1.2.3&ISO")
    expected: dict[str, Feed] = {"A01": Added(ids), "A08": Revised(ids), "A40": Merged(ids, (SUBSUMED,))}
    assert read(message.to_er7()) == FeedMessage("17", expected[event])


@pytest.mark.parametrize(
    "identifiers",
    [
        f"~^^^~local^^^WEST~test-1^^^&{AUTHORITY}&ISO",  # empty repetitions, one without an OID
        f"test-1^^^WEST&{AUTHORITY}&ISO^PI^WEST",  # identifier type and facility
        f"test-1^^^&{AUTHORITY}",  # the type of the OID left out
        f"test-1^^^&{AUTHORITY}&ISO~test-1^^^&{AUTHORITY}&ISO",
        f"{'9' * 300}^^^&{AUTHORITY}&ISO~a\x00b^^^&{AUTHORITY}&ISO~test-1^^^&{AUTHORITY}&ISO",
        f"test-1^7^M11^&{AUTHORITY}&ISO~4711^^^&0DAA5CA2-4D3F&GUID",
    ],
)
def test_identifiers_as_they_come(identifiers):
    assert read(ADMIT.replace(f"test-1^^^WEST&{AUTHORITY}&ISO", identifiers)).feed == Added((PATIENT,))


def test_delimiters_within_an_identifier_stay_escaped():
    assert read(ADMIT.replace("test-1", "a\\T\\b\\S\\c")).feed == Added((f"a\\T\\b\\S\\c^^^&{AUTHORITY}&ISO",))


@pytest.mark.parametrize("escape", ["\\Zsecret\\", "\\", "\\\\", "\\Xsecret\\"])
def test_wrong_escapes_are_not_told_in_the_log(escape, caplog):
    read(ADMIT.replace("test-1", f"a{escape}b~test-1"))
    assert caplog.records == []


def test_other_delimiters():
    swapped = ADMIT.translate(str.maketrans({"|": "$", "^": "%", "~": "*", "\\": "!", "&": "#"}))
    assert read(swapped).feed == Added((PATIENT,))
    header = iti8.decode_header(swapped.encode())
    answer = iti8.encode_acknowledgement(header, control_id="ACK1", time="20240229101501")
    assert answer.startswith(b"MSH$%*!#$REGISTRY$XDS$ADT1$MCM$")
    assert hl7.parse(answer.decode()).extract_field("MSA", 1, 2) == "MSG00001"


def test_segments_that_are_not_asked_for_are_not_parsed():
    """A picture of the patient, or a million of anything, costs no more than reading past it."""
    assert read(ADMIT + "OBX|1|ED|||" + "|^~&" * 200_000 + "\r" + "ZZZ|1\r" * 20_000).feed == Added((PATIENT,))


@pytest.mark.parametrize("end", ["\r\n", "\n", "\r\r"])
def test_other_line_ends(end):
    assert read("MSH" + ADMIT.removeprefix("MSH").replace("\r", end)).feed == Added((PATIENT,))


@pytest.mark.parametrize(
    ("declared", "codec"),
    [
        ("", "utf-8"),
        ("", "latin-1"),
        ("8859/1", "iso8859-1"),
        ("8859/15", "iso8859-15"),
        ("UNICODE UTF-8", "utf-8"),
        ("GB 18030-2000", "gb18030"),
        ("8859/1~UNICODE UTF-8", "iso8859-1"),
    ],
)
def test_character_sets(declared, codec):
    text = ADMIT.replace("2.3.1||||||", f"2.3.1||||||{declared}").replace("SAMPLE^ADA", "MÜLLER^ÄNNE")
    assert read(text.encode(codec)).feed == Added((PATIENT,))


def test_kanji_that_hold_delimiter_bytes():
    name = "表ソ|能"  # 0x5C and 0x7C as second bytes in double-byte codes
    text = ADMIT.replace("2.3.1||||||", "2.3.1||||||ISO IR87").replace("SAMPLE^ADA", name.replace("|", ""))
    assert read(text.encode("iso2022_jp")).feed == Added((PATIENT,))


REFUSED = [
    (ADMIT.replace("2.3.1||||||", "2.3.1||||||KLINGON"), "AR", 103),
    (ADMIT.replace("2.3.1||||||", "2.3.1||||||UNICODE UTF-8").replace("ADA", "Ä").encode("latin-1"), "AR", 102),
    (ADMIT.replace("ADT^A01^ADT_A01", "ORU^R01"), "AR", 200),
    (ADMIT.replace("ADT^A01^ADT_A01", "ADT^A28"), "AR", 201),
    (ADMIT.replace("|2.3.1|", "|3.0|"), "AR", 203),
    (ADMIT.replace("MSG00001", ""), "AR", 101),
    (ADMIT.replace("PID|", "ZID|"), "AE", 100),
    (ADMIT + ADMIT.split("\r")[2] + "\r", "AE", 100),
    (ADMIT.replace(f"test-1^^^WEST&{AUTHORITY}&ISO", ""), "AE", 101),
    (ADMIT.replace(f"test-1^^^WEST&{AUTHORITY}&ISO", "local^^^WEST"), "AE", 204),
    (ADMIT.replace(f"test-1^^^WEST&{AUTHORITY}&ISO", "~".join(f"{n}^^^&1.2&ISO" for n in range(200))), "AE", 102),
    (ADMIT.replace("SAMPLE", "|" * 20_000), "AE", 102),
    (MERGE.replace("MRG|", "ZRG|"), "AE", 100),
    (MERGE.replace("MRG|test-2", "MRG|"), "AE", 204),
]


@pytest.mark.parametrize(("text", "code", "error"), REFUSED)
@pytest.mark.parametrize("version", ["2.3.1", "2.5"])
def test_what_is_refused_and_how_it_is_answered(text, code, error, version):
    if isinstance(text, str):
        text = text.replace("2.3.1", version)
    with pytest.raises(iti8.NotAccepted) as raised:
        read(text)
    assert (raised.value.code, raised.value.error) == (code, error)
    answer = acknowledged(text, raised.value)
    assert answer.extract_field("MSA", 1, 1) == code
    assert answer.extract_field("MSA", 1, 3) == str(raised.value)
    if answer.extract_field("MSH", 1, 12) != "2.3.1":
        assert answer.extract_field("ERR", 1, 3, 1, 1) == str(error)
        assert answer.extract_field("ERR", 1, 4) == "E"
    else:
        assert answer.extract_field("ERR", 1, 1, 1, 4, 1) == str(error)


def test_an_acknowledgement_goes_back_where_the_message_came_from():
    answer = acknowledged(ADMIT)
    assert [answer.extract_field("MSH", 1, number) for number in (3, 4, 5, 6)] == ["REGISTRY", "XDS", "ADT1", "MCM"]
    assert [answer.extract_field("MSH", 1, 9, 1, component) for component in (1, 2, 3)] == ["ACK", "A01", "ACK"]
    assert answer.extract_field("MSA", 1, 1) == "AA"
    assert answer.extract_field("MSA", 1, 2) == "MSG00001"
    assert answer.extract_field("MSH", 1, 12) == "2.3.1"
    with pytest.raises(KeyError):
        answer.segments("ERR")


@pytest.mark.parametrize(
    "data", [b"", b"MSH", b"MSH|^~\\", b"MSH|^~~&|A", b"MSHABCDE|", b"PID|1", b"MSH|^~\r&|A", b"\xff" * 100]
)
def test_what_has_no_header_cannot_be_answered(data):
    with pytest.raises(MalformedMessage):
        iti8.decode_header(data)


_PIECES = st.sampled_from([*"|^~\\&\r\nPID", "MRG", "MSH", "^^^", "&1.2&ISO", "\\", "~~", "\x00", "ä", "1"])


@given(pieces=st.lists(st.tuples(st.integers(0, len(MERGE)), _PIECES), max_size=12))
def test_a_message_that_is_garbled_is_read_or_refused(pieces):
    text = MERGE
    for position, piece in pieces:
        text = text[:position] + piece + text[position:]
    data = text.encode()
    try:
        iti8.decode_message(iti8.decode_header(data), data)
    except MalformedMessage:
        pass
    except iti8.NotAccepted as problem:
        iti8.encode_acknowledgement(iti8.decode_header(data), control_id="1", time="2024", problem=problem)


@pytest.mark.parametrize("cut", range(9, len(MERGE), 7))
def test_a_message_that_is_cut_off_is_read_or_refused(cut):
    try:
        read(MERGE[:cut])
    except iti8.NotAccepted as problem:
        acknowledged(MERGE[:cut], problem)
