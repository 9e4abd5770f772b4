"""What a query answer holds, against the notation of the cases (`SSwithOneDoc`, `Documents=2`, `DocApp`, ...)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tests.support.soap_client import APPROVED, DEPRECATED, RIM

SUBMISSION_SET = "urn:uuid:a54d6aa5-d40d-43f9-88c5-b4633d873bdd"
FOLDER = "urn:uuid:d9d542f3-6cc4-48b6-8870-ea235fbc94c2"
HAS_MEMBER = "urn:oasis:names:tc:ebxml-regrep:AssociationType:HasMember"

# name: submission sets, document entries, folders, associations
SHAPES = {
    "SSwithOneDoc": (1, 1, 0, 1),
    "SSwithTwoDoc": (1, 2, 0, 2),
    "SSwithOneFol": (1, 0, 1, 1),
    "SSwithOneDocOneFol": (1, 1, 1, 4),
    "SSwithTwoDocOneFol": (1, 2, 1, 7),
    "None": (0, 0, 0, 0),
}


@dataclass
class Contents:
    """The objects of a RegistryObjectList by kind."""

    submission_sets: list[Any]
    documents: list[Any]
    folders: list[Any]
    associations: list[Any]
    references: list[Any]

    @property
    def counts(self) -> tuple[int, int, int, int]:
        return len(self.submission_sets), len(self.documents), len(self.folders), len(self.associations)

    def __str__(self) -> str:
        sets, documents, folders, associations = self.counts
        return (
            f"{sets} submission sets, {documents} documents, {folders} folders, {associations} associations, "
            f"{len(self.references)} references"
        )


def read(body: Any) -> Contents:
    """Sort the objects of an AdhocQueryResponse."""
    (listed,) = body.findall(f"{{{RIM}}}RegistryObjectList")
    marks = {
        each.get("classifiedObject"): each.get("classificationNode")
        for each in listed.iter(f"{{{RIM}}}Classification")
        if each.get("classificationNode")
    }
    packages = listed.findall(f"{{{RIM}}}RegistryPackage")
    for each in packages:
        assert marks.get(each.get("id")) in (SUBMISSION_SET, FOLDER), "a package that is neither set nor folder"
    return Contents(
        [each for each in packages if marks[each.get("id")] == SUBMISSION_SET],
        listed.findall(f"{{{RIM}}}ExtrinsicObject"),
        [each for each in packages if marks[each.get("id")] == FOLDER],
        listed.findall(f"{{{RIM}}}Association"),
        listed.findall(f"{{{RIM}}}ObjectRef"),
    )


def check(body: Any, expected: Iterable[str]) -> None:
    """Check an answer against each word of the notation."""
    found = read(body)
    for word in expected:
        if word in SHAPES:
            assert found.counts == SHAPES[word], f"{word}: {found}"
            if word != "None":
                assert {each.get("status") for each in found.submission_sets} == {APPROVED}, word
                ids = {each.get("id") for each in (*found.submission_sets, *found.folders)}
                for each in found.associations:
                    assert each.get("associationType") == HAS_MEMBER, word
                    assert each.get("sourceObject") in ids, word
        elif word in ("DocApp", "DocDep"):
            status = APPROVED if word == "DocApp" else DEPRECATED
            assert found.documents, word
            assert {each.get("status") for each in found.documents} == {status}, word
        elif word == "SSApproved":
            assert found.submission_sets, word
            assert {each.get("status") for each in found.submission_sets} == {APPROVED}, word
        elif match := re.fullmatch(r"(SubmissionSets|Documents|Folders|Associations|ObjectRefs)=(\d+)", word):
            listed = {
                "SubmissionSets": found.submission_sets,
                "Documents": found.documents,
                "Folders": found.folders,
                "Associations": found.associations,
                "ObjectRefs": found.references,
            }[match[1]]
            assert len(listed) == int(match[2]), f"{word}: {found}"
            if match[1] == "ObjectRefs":
                assert found.counts == (0, 0, 0, 0), f"{word}: {found}"
        else:
            raise ValueError(f"contents {word!r} are not in the notation of the cases")
