"""Stored queries on the wire: query:AdhocQueryRequest to and from query values.

References
----------
* IHE ITI TF-2, 3.18.4.1.2.3 (parameters), 3.18.4.1.2.3.5 (coding of values)
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

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
from xca_imaging.metadata.stored_query import (
    SINGLE_PATIENT,
    Definition,
    Kind,
    Parameter,
    Query,
    ReturnType,
    StoredQuery,
    definition_of,
)
from xca_imaging.wire.xml import qname

_STATUSES = (uids.APPROVED, uids.DEPRECATED)
_RETURN_TYPES: tuple[ReturnType, ...] = ("LeafClass", "ObjectRef")


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


def decode_adhoc_query(
    request: etree._Element, definitions: Mapping[str, Definition] = SINGLE_PATIENT, *, max_text: int = 1_000_000
) -> StoredQuery:
    """Return the query of a query:AdhocQueryRequest. Parameters that its definition does not have are ignored.

    Parameters
    ----------
    definitions : mapping of str to Definition
        The queries that the transaction has, by id.
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
    definition = definitions.get(query_id.lower())
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
    if definition.some and not any(name in slots for name in definition.some):
        raise StoredQueryMissingParam(f"{definition.name}: one of {', '.join(definition.some)} is required")
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
