"""Stored queries as typed values, and AdhocQuery elements to and from them.

References
----------
* IHE ITI TF-2, 3.18.4.1.2.3 (parameters), 3.18.4.1.2.3.5 (coding of values), 3.18.4.1.2.3.7 (the queries)
"""

from __future__ import annotations

import enum
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

from lxml import etree

from xca_imaging import uids
from xca_imaging.errors import (
    LocalProtocolError,
    MalformedMessage,
    RegistryError,
    StoredQueryMissingParam,
    StoredQueryParamNumber,
    UnknownStoredQuery,
)
from xca_imaging.metadata.datatypes import is_dtm
from xca_imaging.metadata.model import Code
from xca_imaging.wire.xml import qname

ReturnType = Literal["LeafClass", "ObjectRef"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FindDocuments:
    """FindDocuments and FindDocumentsByReferenceId (3.18.4.1.2.3.7.1, .14).

    A flat tuple is a list of alternatives (OR), empty = not asked. A tuple of tuples is AND over OR: each inner tuple
    was one slot. Times are DTM: from <= value < to. `author_persons` are SQL LIKE patterns. `reference_ids` is not
    empty for the query by reference id only.
    """

    patient_id: str
    status: tuple[str, ...]
    types: tuple[str, ...] = (uids.STABLE_DOCUMENT,)
    class_codes: tuple[Code, ...] = ()
    type_codes: tuple[Code, ...] = ()
    practice_setting_codes: tuple[Code, ...] = ()
    healthcare_facility_type_codes: tuple[Code, ...] = ()
    format_codes: tuple[Code, ...] = ()
    event_codes: tuple[tuple[Code, ...], ...] = ()
    confidentiality_codes: tuple[tuple[Code, ...], ...] = ()
    reference_ids: tuple[tuple[str, ...], ...] = ()
    author_persons: tuple[str, ...] = ()
    creation_time_from: str = ""
    creation_time_to: str = ""
    service_start_time_from: str = ""
    service_start_time_to: str = ""
    service_stop_time_from: str = ""
    service_stop_time_to: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class GetDocuments:
    """GetDocuments (3.18.4.1.2.3.7.5): by entryUUID or by uniqueId, exactly one of the two is not empty."""

    entry_uuids: tuple[str, ...] = ()
    unique_ids: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class GetAll:
    """GetAll (3.18.4.1.2.3.7.4): everything of one patient, with every association from or to what is returned."""

    patient_id: str
    document_status: tuple[str, ...]
    submission_set_status: tuple[str, ...]
    folder_status: tuple[str, ...]
    types: tuple[str, ...] = (uids.STABLE_DOCUMENT,)
    format_codes: tuple[Code, ...] = ()
    confidentiality_codes: tuple[tuple[Code, ...], ...] = ()


Query = FindDocuments | GetDocuments | GetAll


@dataclass(frozen=True, slots=True)
class StoredQuery:
    """One query request: what is asked, how it is to be returned, and of which community (AdhocQuery/@home)."""

    query: Query
    return_type: ReturnType = "LeafClass"
    home_community_id: str = ""


# --------------------------------------------------------------------------------------------------------------------
# The queries as data
# --------------------------------------------------------------------------------------------------------------------


class Kind(enum.Enum):
    """How the values of a parameter are coded (3.18.4.1.2.3.5)."""

    STRING = "string"
    """In single quotes."""
    CODE = "code"
    """In single quotes, `code^^scheme`."""
    TIME = "time"
    """A DTM, written as a number: without quotes."""
    STATUS = "status"
    """In single quotes; values that are no availabilityStatus are ignored."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter: `name` on the wire, `field` of the query value.

    `many`: a list in parentheses, its values are alternatives (OR). `repeatable`: the slot may stand several times,
    all of which must match (AND); the field is then a tuple of tuples.
    """

    name: str
    field: str
    kind: Kind = Kind.STRING
    required: bool = False
    many: bool = False
    repeatable: bool = False


@dataclass(frozen=True, slots=True)
class Definition:
    """One stored query: its id, the value that it becomes, its parameters.

    Exactly one of the parameters named in `either` must be given.
    """

    id: str
    name: str
    build: Callable[..., Query]
    parameters: tuple[Parameter, ...]
    either: tuple[str, ...] = ()


def _code(name: str, field: str) -> Parameter:
    return Parameter(name, field, Kind.CODE, many=True)


def _codes_all(name: str, field: str) -> Parameter:
    return Parameter(name, field, Kind.CODE, many=True, repeatable=True)


def _status(name: str, field: str) -> Parameter:
    return Parameter(name, field, Kind.STATUS, required=True, many=True)


def _times(name: str, field: str) -> tuple[Parameter, Parameter]:
    return (
        Parameter(f"{name}From", f"{field}_from", Kind.TIME),
        Parameter(f"{name}To", f"{field}_to", Kind.TIME),
    )


_FORMAT_CODE = _code("$XDSDocumentEntryFormatCode", "format_codes")
_CONFIDENTIALITY_CODE = _codes_all("$XDSDocumentEntryConfidentialityCode", "confidentiality_codes")
_ENTRY_TYPE = Parameter("$XDSDocumentEntryType", "types", many=True)

_FIND_DOCUMENTS_PARAMETERS = (  # 3.18.4.1.2.3.7.1
    Parameter("$XDSDocumentEntryPatientId", "patient_id", required=True),
    _code("$XDSDocumentEntryClassCode", "class_codes"),
    _code("$XDSDocumentEntryTypeCode", "type_codes"),
    _code("$XDSDocumentEntryPracticeSettingCode", "practice_setting_codes"),
    *_times("$XDSDocumentEntryCreationTime", "creation_time"),
    *_times("$XDSDocumentEntryServiceStartTime", "service_start_time"),
    *_times("$XDSDocumentEntryServiceStopTime", "service_stop_time"),
    _code("$XDSDocumentEntryHealthcareFacilityTypeCode", "healthcare_facility_type_codes"),
    _codes_all("$XDSDocumentEntryEventCodeList", "event_codes"),
    _CONFIDENTIALITY_CODE,
    Parameter("$XDSDocumentEntryAuthorPerson", "author_persons", many=True),
    _FORMAT_CODE,
    _status("$XDSDocumentEntryStatus", "status"),
    _ENTRY_TYPE,
)

FIND_DOCUMENTS = Definition(
    "urn:uuid:14d4debf-8f97-4251-9a74-a90016b0af0d", "FindDocuments", FindDocuments, _FIND_DOCUMENTS_PARAMETERS
)
FIND_DOCUMENTS_BY_REFERENCE_ID = Definition(  # 3.18.4.1.2.3.7.14
    "urn:uuid:12941a89-e02e-4be5-967c-ce4bfc8fe492",
    "FindDocumentsByReferenceId",
    FindDocuments,
    (
        *_FIND_DOCUMENTS_PARAMETERS,
        Parameter("$XDSDocumentEntryReferenceIdList", "reference_ids", required=True, many=True, repeatable=True),
    ),
)
GET_DOCUMENTS = Definition(  # 3.18.4.1.2.3.7.5
    "urn:uuid:5c4f972b-d56b-40ac-a5fc-c8ca9b40b9d4",
    "GetDocuments",
    GetDocuments,
    (
        Parameter("$XDSDocumentEntryEntryUUID", "entry_uuids", many=True),
        Parameter("$XDSDocumentEntryUniqueId", "unique_ids", many=True),
    ),
    either=("$XDSDocumentEntryEntryUUID", "$XDSDocumentEntryUniqueId"),
)
GET_ALL = Definition(  # 3.18.4.1.2.3.7.4
    "urn:uuid:10b545ea-725c-446d-9b95-8aeb444eddf3",
    "GetAll",
    GetAll,
    (
        Parameter("$patientId", "patient_id", required=True),
        _status("$XDSDocumentEntryStatus", "document_status"),
        _status("$XDSSubmissionSetStatus", "submission_set_status"),
        _status("$XDSFolderStatus", "folder_status"),
        _FORMAT_CODE,
        _CONFIDENTIALITY_CODE,
        _ENTRY_TYPE,
    ),
)

DEFINITIONS: Mapping[str, Definition] = {
    definition.id: definition for definition in (FIND_DOCUMENTS, FIND_DOCUMENTS_BY_REFERENCE_ID, GET_DOCUMENTS, GET_ALL)
}

_STATUSES = (uids.APPROVED, uids.DEPRECATED)
_RETURN_TYPES: tuple[ReturnType, ...] = ("LeafClass", "ObjectRef")


def definition_of(query: Query) -> Definition:
    """Return the stored query that a query value is sent as."""
    if isinstance(query, FindDocuments):
        return FIND_DOCUMENTS_BY_REFERENCE_ID if query.reference_ids else FIND_DOCUMENTS
    return GET_DOCUMENTS if isinstance(query, GetDocuments) else GET_ALL


# --------------------------------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------------------------------

_REQUEST = qname(uids.NS_QUERY, "AdhocQueryRequest")
_RESPONSE_OPTION = qname(uids.NS_QUERY, "ResponseOption")
_ADHOC_QUERY = qname(uids.NS_RIM, "AdhocQuery")
_SLOT = qname(uids.NS_RIM, "Slot")
_VALUE_LIST = qname(uids.NS_RIM, "ValueList")
_VALUE = qname(uids.NS_RIM, "Value")

_TOKEN = re.compile(
    r"""\s*(?:
        '(?P<single>[^']*(?:''[^']*)*)'     # the rule: a quote inside is doubled
      | "(?P<double>[^"]*(?:""[^"]*)*)"     # samples of the Technical Framework write lists so
      | (?P<mark>[(),])
      | (?P<bare>[^\s'"(),]+)
    )\s*""",
    re.VERBOSE,
)


def decode_adhoc_query(request: etree._Element, *, max_text: int = 1_000_000) -> StoredQuery:
    """Return the query of a query:AdhocQueryRequest. Parameters that its definition does not have are ignored.

    Parameters
    ----------
    max_text : int
        Characters of all values together: 20 000 UUIDs. Reading millions of empty values would only cost time.

    Raises
    ------
    MalformedMessage
        When there is no AdhocQuery in it.
    UnknownStoredQuery, StoredQueryMissingParam, StoredQueryParamNumber
        As in 3.18.4.1.3.
    RegistryError
        When another returnType than LeafClass or ObjectRef is asked for.
    """
    adhoc_query = request.find(_ADHOC_QUERY)
    if adhoc_query is None:
        raise MalformedMessage("AdhocQueryRequest holds no rim:AdhocQuery")
    query_id = adhoc_query.get("id", "").strip()
    definition = DEFINITIONS.get(query_id.lower())
    if definition is None:
        raise UnknownStoredQuery(f"stored query {query_id[:64]!r} is not known here")
    slots: dict[str, list[list[str]]] = {}
    for slot in adhoc_query.iterchildren(_SLOT):
        texts = [value.text or "" for value in slot.iterfind(f"{_VALUE_LIST}/{_VALUE}")]
        slots.setdefault(slot.get("name", ""), []).append(texts)
    if sum(len(text) for texts in chain.from_iterable(slots.values()) for text in texts) > max_text:
        raise StoredQueryParamNumber(f"the values of the query have more than {max_text} characters")
    return StoredQuery(_read_query(definition, slots), _return_type(request), adhoc_query.get("home", "").strip())


def _return_type(request: etree._Element) -> ReturnType:
    option = request.find(_RESPONSE_OPTION)
    asked = "" if option is None else option.get("returnType", "")
    for known in _RETURN_TYPES:
        if asked == known:
            return known
    raise RegistryError(f"returnType {asked[:40]!r} is not supported; ask for LeafClass or ObjectRef")


def _read_query(definition: Definition, slots: Mapping[str, list[list[str]]]) -> Query:
    given = [name for name in definition.either if name in slots]
    if len(given) > 1:
        raise StoredQueryParamNumber(f"{definition.name}: only one of {' and '.join(given)} is allowed")
    if definition.either and not given:
        raise StoredQueryMissingParam(f"{definition.name}: one of {', '.join(definition.either)} is required")
    values: dict[str, Any] = {}
    for parameter in definition.parameters:
        found = slots.get(parameter.name)
        if found is not None:
            value = _read_parameter(parameter, found)
            if value:
                values[parameter.field] = value
            elif not parameter.required and parameter.name not in given:
                raise StoredQueryParamNumber(f"{definition.name}: {parameter.name} has no value")
        if parameter.field not in values and (parameter.required or parameter.name in given):
            raise StoredQueryMissingParam(f"{definition.name}: {parameter.name} is required")
    return definition.build(**values)


def _read_parameter(parameter: Parameter, slots: list[list[str]]) -> str | Code | tuple[Any, ...]:
    if len(slots) > 1 and not parameter.repeatable:
        raise StoredQueryParamNumber(f"{parameter.name} stands {len(slots)} times, at most once is allowed")
    if not parameter.many:
        items = _tokens(parameter, slots[0], as_list=False)
        if len(items) > 1:
            raise StoredQueryParamNumber(f"{parameter.name} has {len(items)} values, exactly one is allowed")
        return _read_value(parameter, items[0]) if items else ""
    lists = [tuple(_read_value(parameter, item) for item in _tokens(parameter, texts, as_list=True)) for texts in slots]
    if parameter.repeatable:
        return tuple(values for values in lists if values)
    if parameter.kind is Kind.STATUS:
        return tuple(value for value in lists[0] if value in _STATUSES)
    return lists[0]


def _tokens(parameter: Parameter, texts: list[str], *, as_list: bool) -> list[str]:
    """Return the values of one slot.

    All its rim:Value elements are read as one text, because a list may go on from one to the next, either as a list
    of its own or in the middle (3.18.4.1.2.3.5). A list of one value is taken where a single value is due.
    """
    values: list[str] = []
    inside = False
    for text in texts:
        position = 0
        text = text.strip()
        while position < len(text):
            match = _TOKEN.match(text, position)
            if match is None:
                raise StoredQueryParamNumber(f"{parameter.name}: a quote is not closed")
            position = match.end()
            kind, value = match.lastgroup, match[match.lastgroup or 0]
            if kind == "mark":
                if value == ",":
                    continue
                if inside == (value == "("):
                    raise StoredQueryParamNumber(f"{parameter.name}: parentheses do not match")
                inside = not inside
                continue
            if as_list and not inside:
                raise StoredQueryParamNumber(f"{parameter.name}: values must stand in a list, ('a','b')")
            if kind == "bare" and parameter.kind is not Kind.TIME:
                raise StoredQueryParamNumber(f"{parameter.name}: values must stand in single quotes")
            values.append(value.replace("''", "'") if kind == "single" else value.replace('""', '"'))
    if inside:
        raise StoredQueryParamNumber(f"{parameter.name}: parentheses do not match")
    return values


def _read_value(parameter: Parameter, text: str) -> str | Code:
    if parameter.kind is Kind.CODE:
        parts = text.split("^")
        if len(parts) != 3 or not parts[0] or not parts[2]:
            raise StoredQueryParamNumber(f"{parameter.name}: {text[:64]!r} is not code^^scheme")
        return Code(parts[0], parts[2])
    if parameter.kind is Kind.TIME and text and not is_dtm(text):
        raise StoredQueryParamNumber(f"{parameter.name}: {text[:32]!r} is not a time, YYYY[MM[DD[hh[mm[ss]]]]]")
    return text


# --------------------------------------------------------------------------------------------------------------------
# Writing
# --------------------------------------------------------------------------------------------------------------------


def encode_adhoc_query(stored_query: StoredQuery, *, max_value: int = 256) -> etree._Element:
    """Return the query:AdhocQueryRequest of a query.

    Parameters
    ----------
    max_value : int
        A list longer than this goes on in another rim:Value: rim:LongName has at most 256 characters (ebRIM 3.0).
    """
    query = stored_query.query
    definition = definition_of(query)
    request = etree.Element(_REQUEST, nsmap={"query": uids.NS_QUERY, "rim": uids.NS_RIM})
    option = etree.SubElement(request, _RESPONSE_OPTION)
    option.set("returnComposedObjects", "true")
    option.set("returnType", stored_query.return_type)
    adhoc_query = etree.SubElement(request, _ADHOC_QUERY)
    adhoc_query.set("id", definition.id)
    if stored_query.home_community_id:
        adhoc_query.set("home", stored_query.home_community_id)
    for parameter in definition.parameters:
        value = getattr(query, parameter.field)
        if not value:
            continue
        for alternatives in value if parameter.repeatable else (value,):
            texts = [_write_value(parameter, item) for item in (alternatives if parameter.many else (alternatives,))]
            slot = etree.SubElement(adhoc_query, _SLOT)
            slot.set("name", parameter.name)
            value_list = etree.SubElement(slot, _VALUE_LIST)
            for chunk in _lists(texts, max_value) if parameter.many else texts:
                etree.SubElement(value_list, _VALUE).text = chunk
    return request


def _write_value(parameter: Parameter, value: str | Code) -> str:
    if isinstance(value, Code):
        if "^" in value.code + value.scheme or not value.code or not value.scheme:
            raise LocalProtocolError(f"{parameter.name}: {value.code!r} of {value.scheme!r} cannot be asked for")
        value = f"{value.code}^^{value.scheme}"
    if parameter.kind is Kind.TIME:
        return value
    return "'" + value.replace("'", "''") + "'"


def _lists(texts: list[str], max_value: int) -> Iterator[str]:
    """Return the texts as lists in parentheses, a new list wherever one would grow over `max_value` characters."""
    pending: list[str] = []
    length = 1
    for text in texts:
        if pending and length + len(text) + 1 > max_value:
            yield f"({','.join(pending)})"
            pending, length = [], 1
        pending.append(text)
        length += len(text) + 1
    yield f"({','.join(pending)})"
