"""Document metadata in ebRIM 3.0: model values to elements and back.

Reading and writing follow the same tables (`metadata.layouts`), so that what is read is written again. Slots,
classifications and external identifiers that IHE does not define stay with the object.

Reading does not judge: a missing or ill-formed attribute is `metadata.validate`'s business. It reports only what the
model has no room for (two values where one is allowed, a size that is no number, a package that is neither a
SubmissionSet nor a Folder) and goes on, because an answer of a peer is better read with a flaw than not at all.

References
----------
* IHE ITI TF-3, 4.2.2 (associations), 4.2.3.1 (attributes: slots, classifications, external identifiers, authors),
  4.2.5.2 (object type UUIDs)
* OASIS ebRIM 3.0, 2.4 (RegistryObject), 2.9 (Slot)
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterator, Mapping
from itertools import count
from typing import Any, Literal, cast

from lxml import etree

from xca_imaging import uids
from xca_imaging.errors import LocalProtocolError, RegistryError, RegistryMetadataError, SubmissionRefused
from xca_imaging.metadata import layouts
from xca_imaging.metadata.model import (
    Association,
    Author,
    Classification,
    Code,
    DocumentEntry,
    ExternalIdentifier,
    Folder,
    ObjectRef,
    RegistryObject,
    Slot,
    Submission,
    SubmissionSet,
    Translation,
)
from xca_imaging.wire.xml import qname

_PREFIXES = {"rim": uids.NS_RIM}  # the same everywhere, so that serialised fragments read alike in any message
_CLASSIFICATION_TYPE = layouts.OBJECT_TYPE + "Classification"
_EXTERNAL_IDENTIFIER_TYPE = layouts.OBJECT_TYPE + "ExternalIdentifier"

_EXTRINSIC_OBJECT = qname(uids.NS_RIM, "ExtrinsicObject")
_REGISTRY_PACKAGE = qname(uids.NS_RIM, "RegistryPackage")
_REGISTRY_OBJECT_LIST = qname(uids.NS_RIM, "RegistryObjectList")
_ASSOCIATION = qname(uids.NS_RIM, "Association")
_CLASSIFICATION = qname(uids.NS_RIM, "Classification")
_EXTERNAL_IDENTIFIER = qname(uids.NS_RIM, "ExternalIdentifier")
_OBJECT_REF = qname(uids.NS_RIM, "ObjectRef")
_SLOT = qname(uids.NS_RIM, "Slot")
_VALUE_LIST = qname(uids.NS_RIM, "ValueList")
_VALUE = qname(uids.NS_RIM, "Value")
_NAME = qname(uids.NS_RIM, "Name")
_DESCRIPTION = qname(uids.NS_RIM, "Description")
_LOCALIZED_STRING = qname(uids.NS_RIM, "LocalizedString")
_VERSION_INFO = qname(uids.NS_RIM, "VersionInfo")
_LANG = qname(uids.NS_XML, "lang")

_TEXTS: tuple[tuple[str, Literal["title", "comments"]], ...] = ((_NAME, "title"), (_DESCRIPTION, "comments"))

_LIMITED_METADATA = {  # TF-3 4.2.3.1: marks of XDM and XDR; XDS forbids limited metadata (4.3.1)
    "urn:uuid:ab9b591b-83ab-4d03-8f5d-f93b1fb92e85",
    "urn:uuid:5003a9db-8d8d-49e6-bf0c-990e34ac7707",
    "urn:uuid:2c144a76-29a9-4b7c-af54-b25409fe7d03",
}


# --------------------------------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------------------------------


def decode_registry_objects(
    registry_object_list: etree._Element,
    *,
    problems: list[RegistryError] | None = None,
    error: type[RegistryError] = RegistryMetadataError,
    max_problems: int = 100,
) -> Submission:
    """Return what a rim:RegistryObjectList holds.

    Parameters
    ----------
    problems : list of RegistryError, optional
        Takes what could not be read; the rest is returned. Without it any problem ends the reading.
    error : type of RegistryError
        Class of the problems: a repository answers another code than a registry.
    max_problems : int
        More are not collected: nobody reads them, and a small message must not make a large answer.

    Raises
    ------
    SubmissionRefused
        With every problem found, when `problems` is not given.
    """
    reader = _Reader(error, max_problems)
    submission = reader.read_list(registry_object_list)
    if problems is not None:
        problems.extend(reader.problems)
    elif reader.problems:
        raise SubmissionRefused(tuple(reader.problems))
    return submission


def decode_object(element: etree._Element, *, error: type[RegistryError] = RegistryMetadataError) -> RegistryObject:
    """Return the object of one ExtrinsicObject, RegistryPackage (with its marker inside) or Association.

    Raises
    ------
    SubmissionRefused
        When it is none of these, or holds what the model has no room for.
    """
    reader = _Reader(error)
    decoded = reader.read_object(element, {})
    if decoded is None or reader.problems:
        raise SubmissionRefused(tuple(reader.problems))
    return decoded


class _Reader:
    """Reads objects and collects in `problems` what the model has no room for."""

    def __init__(self, error: type[RegistryError], max_problems: int = 100) -> None:
        self._error, self._max_problems = error, max_problems
        self.problems: list[RegistryError] = []

    def _problem(self, where: str, text: str) -> None:
        if len(self.problems) < self._max_problems:
            self.problems.append(self._error(f"{where}: {text}"))

    def read_list(self, registry_object_list: etree._Element) -> Submission:
        markers: dict[str, str] = {}
        for element in registry_object_list.iterchildren(_CLASSIFICATION):
            node = element.get("classificationNode", "")
            if node in layouts.PACKAGES:
                markers[element.get("classifiedObject", "")] = node
            else:
                self._stray_classification(element, node)
        by_type: dict[type[Any], list[Any]] = {DocumentEntry: [], SubmissionSet: [], Folder: [], Association: []}
        references: list[ObjectRef] = []
        for element in registry_object_list.iterchildren("*"):
            if element.tag == _CLASSIFICATION:
                continue
            if element.tag == _OBJECT_REF:
                references.append(ObjectRef(element.get("id", ""), element.get("home", "")))
                continue
            decoded = self.read_object(element, markers)
            if decoded is not None:
                by_type[type(decoded)].append(decoded)
        return Submission(
            submission_sets=tuple(by_type[SubmissionSet]),
            documents=tuple(by_type[DocumentEntry]),
            folders=tuple(by_type[Folder]),
            associations=tuple(by_type[Association]),
            object_refs=tuple(references),
        )

    def read_object(self, element: etree._Element, markers: Mapping[str, str]) -> RegistryObject | None:
        if element.tag == _EXTRINSIC_OBJECT:
            return self._read(element, layouts.DOCUMENT_ENTRY)
        if element.tag == _ASSOCIATION:
            return self._read(element, layouts.ASSOCIATION)
        if element.tag == _REGISTRY_PACKAGE:
            layout = self._package_layout(element, markers)
            return None if layout is None else self._read(element, layout)
        self._problem(str(element.tag), "not an object of XDS metadata")
        return None

    def _package_layout(self, element: etree._Element, markers: Mapping[str, str]) -> layouts.Layout | None:
        """Return what a RegistryPackage is: by its marker inside or beside it, else guessed from its identifiers."""
        nodes = [child.get("classificationNode", "") for child in element.iterchildren(_CLASSIFICATION)]
        nodes.append(markers.get(element.get("id", ""), ""))
        for node in nodes:
            if node in layouts.PACKAGES:
                return layouts.PACKAGES[node]
        where = f"RegistryPackage {element.get('id', '')}"
        self._problem(where, "no Classification says whether it is a SubmissionSet or a Folder")
        schemes = {child.get("identificationScheme", "") for child in element.iterchildren(_EXTERNAL_IDENTIFIER)}
        for layout in layouts.PACKAGES.values():
            if schemes & {rule.scheme for rule in layout.identifiers}:
                return layout
        return None

    def _stray_classification(self, element: etree._Element, node: str) -> None:
        where = f"Classification of {element.get('classifiedObject', '')}"
        if node in _LIMITED_METADATA:
            self._problem(where, "limitedMetadata is not allowed")
        else:
            self._problem(where, "stands outside the object that it classifies")

    def _read(self, element: etree._Element, layout: layouts.Layout) -> RegistryObject:
        entry_id = element.get("id", "")
        where = f"{layout.name} {entry_id}"
        values: dict[str, Any] = {
            attribute: element.get(name, "").strip() for name, attribute in layout.attributes.items()
        }
        if layout.named:
            values.update(_texts(element))
        version = element.find(_VERSION_INFO)
        values["version"] = "" if version is None else version.get("versionName", "")
        slots = self._slots(element, where)
        values.update(self._known_slots(slots, layout.slots, where))
        if "size" in values:
            values["size"] = self._size(values["size"], where)
        values["extra_slots"] = _extra_slots(slots, layout.slots)
        values.update(self._classifications(element, layout, where))
        values.update(self._identifiers(element, layout, where))
        if element.tag == _REGISTRY_PACKAGE and element.find(_REGISTRY_OBJECT_LIST) is not None:
            self._problem(where, "objects nested in a RegistryPackage are not allowed; use HasMember associations")
        return layout.build(**values)

    def _slots(self, element: etree._Element, where: str) -> dict[str, tuple[str, ...]]:
        slots: dict[str, list[str]] = {}
        for slot in element.iterchildren(_SLOT):
            name = slot.get("name", "")
            if name in slots:
                self._problem(where, f"slot {name} stands twice")
            values = slots.setdefault(name, [])
            values.extend(value.text or "" for value in slot.iterfind(f"{_VALUE_LIST}/{_VALUE}"))
        return {name: tuple(values) for name, values in slots.items()}

    def _known_slots(
        self, slots: Mapping[str, tuple[str, ...]], rules: tuple[layouts.SlotRule, ...], where: str
    ) -> Iterator[tuple[str, str | tuple[str, ...]]]:
        for rule in rules:
            found = tuple(value.strip() for value in slots.get(rule.name, ()))
            if rule.many:
                yield rule.field, found
                continue
            if len(found) > 1:
                self._problem(where, f"{rule.name} has {len(found)} values, at most one is allowed")
            yield rule.field, found[0] if found else ""

    def _size(self, text: str, where: str) -> int | None:
        # 19 digits hold every 64-bit size; longer ones only cost time to convert.
        if text.isascii() and text.isdigit() and len(text) <= 19:
            return int(text)
        if text:
            self._problem(where, f"size {text[:40]!r} is not a number of bytes")
        return None

    def _classifications(self, element: etree._Element, layout: layouts.Layout, where: str) -> dict[str, Any]:
        rules = {rule.scheme: rule for rule in layout.codes}
        codes: dict[str, list[Code]] = {rule.field: [] for rule in layout.codes}
        authors: list[Author] = []
        extra: list[Classification] = []
        for child in element.iterchildren(_CLASSIFICATION):
            self._parent(child, "classifiedObject", element, where)
            scheme = child.get("classificationScheme", "")
            if scheme in rules:
                codes[rules[scheme].field].append(self._code(child, f"{where}: {rules[scheme].attribute}"))
            elif scheme and scheme == layout.author_scheme:
                slots = self._slots(child, f"{where}: author")
                known: dict[str, Any] = dict(self._known_slots(slots, layouts.AUTHOR_SLOTS, where))
                authors.append(Author(**known, extra_slots=_extra_slots(slots, layouts.AUTHOR_SLOTS)))
            elif child.get("classificationNode", "") in _LIMITED_METADATA:
                self._problem(where, "limitedMetadata is not allowed")
            elif scheme or child.get("classificationNode", "") not in layouts.PACKAGES:
                extra.append(self._unknown_classification(child, where))
        values: dict[str, Any] = {"authors": tuple(authors)} if layout.author_scheme else {}
        values["extra_classifications"] = tuple(extra)
        for rule in layout.codes:
            found = codes[rule.field]
            if rule.many:
                values[rule.field] = tuple(found)
                continue
            if len(found) > 1:
                self._problem(where, f"{rule.attribute} stands {len(found)} times, at most once is allowed")
            values[rule.field] = found[0] if found else None
        return values

    def _unknown_classification(self, element: etree._Element, where: str) -> Classification:
        return Classification(
            element.get("classificationScheme", ""),
            element.get("classificationNode", ""),
            element.get("nodeRepresentation", ""),
            _localized(element.find(_NAME)),
            _extra_slots(self._slots(element, where), ()),
        )

    def _code(self, element: etree._Element, where: str) -> Code:
        schemes = self._slots(element, where).get("codingScheme", ())
        if len(schemes) > 1:
            self._problem(where, f"codingScheme has {len(schemes)} values, exactly one is allowed")
        scheme = schemes[0].strip() if schemes else ""
        return Code(element.get("nodeRepresentation", "").strip(), scheme, _localized(element.find(_NAME)))

    def _identifiers(self, element: etree._Element, layout: layouts.Layout, where: str) -> dict[str, Any]:
        rules = {rule.scheme: rule for rule in layout.identifiers}
        values: dict[str, Any] = {rule.field: "" for rule in layout.identifiers}
        extra: list[ExternalIdentifier] = []
        for child in element.iterchildren(_EXTERNAL_IDENTIFIER):
            self._parent(child, "registryObject", element, where)
            scheme, value = child.get("identificationScheme", ""), child.get("value", "")
            rule = rules.get(scheme)
            if rule is None:
                extra.append(ExternalIdentifier(scheme, value, _localized(child.find(_NAME))))
            elif values[rule.field]:
                self._problem(where, f"{rule.name} stands twice")
            else:
                values[rule.field] = value.strip()
        values["extra_identifiers"] = tuple(extra)
        return values

    def _parent(self, child: etree._Element, attribute: str, parent: etree._Element, where: str) -> None:
        """Check that a nested object names the object around it (TF-3 4.2.3.1.2, 4.2.3.1.3)."""
        named = child.get(attribute, "")
        if named and named != parent.get("id", ""):
            self._problem(where, f"{attribute} of {child.get('id', 'a nested object')} names {named!r} instead")


def _extra_slots(slots: Mapping[str, tuple[str, ...]], rules: tuple[layouts.SlotRule, ...]) -> tuple[Slot, ...]:
    known = {rule.name for rule in rules}
    return tuple(Slot(name, values) for name, values in slots.items() if name not in known)


def _localized(element: etree._Element | None) -> str:
    """Return the first text of a name; language and charset are not looked at."""
    if element is None:
        return ""
    localized = element.find(_LOCALIZED_STRING)
    return "" if localized is None else localized.get("value", "")


def _texts(element: etree._Element) -> Iterator[tuple[str, Any]]:
    """Yield title and comments, each the first text that is given, their languages, and the texts beyond these."""
    translations: list[Translation] = []
    for tag, attribute in _TEXTS:
        parent = element.find(tag)
        found = () if parent is None else tuple(parent.iterchildren(_LOCALIZED_STRING))
        texts = [Translation(attribute, each.get("value", ""), each.get(_LANG, "")) for each in found]
        yield attribute, texts[0].text if texts else ""
        yield f"{attribute}_language", texts[0].language if texts else ""
        translations += texts[1:]
    yield "translations", tuple(translations)


# --------------------------------------------------------------------------------------------------------------------
# Writing
# --------------------------------------------------------------------------------------------------------------------


def encode_registry_objects(submission: Submission) -> etree._Element:
    """Return the rim:RegistryObjectList of a submission or of a query's answer."""
    element = etree.Element(_REGISTRY_OBJECT_LIST, nsmap=_PREFIXES)
    for item in submission:
        element.append(encode_object(item))
    for reference in submission.object_refs:
        element.append(encode_reference(reference))
    return element


def encode_reference(reference: ObjectRef) -> etree._Element:
    """Return the rim:ObjectRef of a reference."""
    element = etree.Element(_OBJECT_REF, nsmap=_PREFIXES)
    element.set("id", reference.id)
    if reference.home_community_id:
        element.set("home", reference.home_community_id)
    return element


def encode_object(item: RegistryObject) -> etree._Element:
    """Return the element of one object, with every attribute that ebRIM demands.

    The ids of its classifications and identifiers follow from its own id, so that the same object is always written
    as the same bytes: UUIDs inside an object that has one, symbolic ids inside one with a symbolic id.

    Raises
    ------
    LocalProtocolError
        When an attribute holds characters that XML does not have: control characters out of a DICOM header, say.
    """
    try:
        return _write(item, layouts.LAYOUTS[type(item)])
    except ValueError as error:
        where = f"{type(item).__name__} {item.entry_uuid!r}"
        raise LocalProtocolError(f"{where} holds characters that cannot stand in XML") from error


def _write(item: RegistryObject, layout: layouts.Layout) -> etree._Element:
    element = etree.Element(layout.tag, nsmap=_PREFIXES)
    for name, attribute in layout.attributes.items():
        value = getattr(item, attribute)
        if value:
            element.set(name, value)
    for name, value in layout.fixed.items():
        element.set(name, value)
    for rule in layout.slots:
        value = getattr(item, rule.field)
        values = tuple(value) if rule.many else () if value in ("", None) else (str(value),)
        if values:
            _add_slot(element, rule.name, values)
    for slot in item.extra_slots:
        _add_slot(element, slot.name, slot.values)
    if layout.named:
        _add_texts(element, cast("DocumentEntry | SubmissionSet | Folder", item))
    if item.version:
        etree.SubElement(element, _VERSION_INFO).set("versionName", item.version)
    ids = _nested_ids(item.entry_uuid)
    _add_classifications(element, item, layout, ids)
    for identifier in layout.identifiers:
        value = getattr(item, identifier.field)
        if value:
            known = ExternalIdentifier(identifier.scheme, value, identifier.name)
            _add_identifier(element, item.entry_uuid, next(ids), known)
    for unknown in item.extra_identifiers:
        _add_identifier(element, item.entry_uuid, next(ids), unknown)
    return element


def _add_classifications(
    element: etree._Element, item: RegistryObject, layout: layouts.Layout, ids: Iterator[str]
) -> None:
    if layout.author_scheme:
        for author in cast("DocumentEntry | SubmissionSet", item).authors:
            child = _add_classification(element, item.entry_uuid, next(ids))
            child.set("classificationScheme", layout.author_scheme)
            child.set("nodeRepresentation", "")  # 4.2.3.1.4: empty, the content is in the slots
            for rule in layouts.AUTHOR_SLOTS:
                value = getattr(author, rule.field)
                values = tuple(value) if rule.many else (value,) if value else ()
                if values:
                    _add_slot(child, rule.name, values)
            for slot in author.extra_slots:
                _add_slot(child, slot.name, slot.values)
    for code_rule in layout.codes:
        value = getattr(item, code_rule.field)
        codes: tuple[Code, ...] = value if code_rule.many else () if value is None else (value,)
        for code in codes:
            child = _add_classification(element, item.entry_uuid, next(ids))
            child.set("classificationScheme", code_rule.scheme)
            child.set("nodeRepresentation", code.code)
            if code.scheme:
                _add_slot(child, "codingScheme", (code.scheme,))
            _add_localized(child, _NAME, code.display)
    for unknown in item.extra_classifications:
        child = _add_classification(element, item.entry_uuid, next(ids))
        for name, value in (
            ("classificationScheme", unknown.scheme),
            ("classificationNode", unknown.node),
            ("nodeRepresentation", unknown.representation),
        ):
            if value:
                child.set(name, value)
        for slot in unknown.slots:
            _add_slot(child, slot.name, slot.values)
        _add_localized(child, _NAME, unknown.name)
    if layout.marker:
        _add_classification(element, item.entry_uuid, next(ids)).set("classificationNode", layout.marker)


def _add_classification(element: etree._Element, classified: str, child_id: str) -> etree._Element:
    child = etree.SubElement(element, _CLASSIFICATION)
    child.set("id", child_id)
    child.set("classifiedObject", classified)
    child.set("objectType", _CLASSIFICATION_TYPE)
    return child


def _add_identifier(element: etree._Element, identified: str, child_id: str, identifier: ExternalIdentifier) -> None:
    child = etree.SubElement(element, _EXTERNAL_IDENTIFIER)
    child.set("id", child_id)
    child.set("registryObject", identified)
    child.set("identificationScheme", identifier.scheme)
    child.set("objectType", _EXTERNAL_IDENTIFIER_TYPE)
    child.set("value", identifier.value)
    _add_localized(child, _NAME, identifier.name)


def _nested_ids(entry_id: str) -> Iterator[str]:
    """Return ids for what is nested in an object.

    A registry that keeps such ids may demand that they are new. Inside a symbolic id they are symbolic too, so that
    it assigns them; a UUID derived from a symbolic id would come back in the next submission.
    """
    if not entry_id.startswith(uids.UUID_PREFIX):
        yield from (f"{entry_id}.{number}" for number in count(1))
    seed = hashlib.sha1(uuid.NAMESPACE_URL.bytes + entry_id.encode(), usedforsecurity=False)
    for number in count(1):
        # UUID version 5 of `entry_id.number`, made by hand: a registration makes a dozen for each object.
        digest = seed.copy()
        digest.update(f".{number}".encode())
        bits = digest.hexdigest()
        variant = "89ab"[int(bits[16], 16) & 3]
        yield f"{uids.UUID_PREFIX}{bits[:8]}-{bits[8:12]}-5{bits[13:16]}-{variant}{bits[17:20]}-{bits[20:32]}"


def _add_slot(element: etree._Element, name: str, values: tuple[str, ...]) -> None:
    slot = etree.SubElement(element, _SLOT)
    slot.set("name", name)
    value_list = etree.SubElement(slot, _VALUE_LIST)
    for value in values:
        etree.SubElement(value_list, _VALUE).text = value


def _add_texts(element: etree._Element, item: DocumentEntry | SubmissionSet | Folder) -> None:
    for tag, attribute in _TEXTS:
        first = Translation(attribute, getattr(item, attribute), getattr(item, f"{attribute}_language"))
        others = [text for text in item.translations if text.attribute == attribute]
        if not (first.text or first.language or others):
            continue
        parent = etree.SubElement(element, tag)
        for text in (first, *others):
            child = etree.SubElement(parent, _LOCALIZED_STRING)
            if text.language:
                child.set(_LANG, text.language)
            child.set("value", text.text)


def _add_localized(element: etree._Element, tag: str, text: str) -> None:
    if text:
        etree.SubElement(etree.SubElement(element, tag), _LOCALIZED_STRING).set("value", text)
