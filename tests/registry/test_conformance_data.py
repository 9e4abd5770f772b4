"""The published conformance data as an oracle of queries: submissions and expected counts made by other hands."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any
from xml.sax.saxutils import escape

import pytest

from tests.registry.conftest import NewUrl
from tests.registry.samples import HOME, PATIENT, decoded, new_uid
from tests.support.shared import ROOT, shared_path
from xca_imaging import uids
from xca_imaging.errors import SubmissionRefused
from xca_imaging.metadata import ebrim
from xca_imaging.metadata.adhoc_query import decode_adhoc_query
from xca_imaging.metadata.model import Association, DocumentEntry, Folder, Submission, SubmissionSet
from xca_imaging.registry import Registry
from xca_imaging.wire import xml

DATA = "conformance/data/iti"


CONTENTS = {"SSwithTwoDocOneFol": {"SubmissionSets": 1, "Documents": 2, "Folders": 1, "Associations": 7}}
TIMES = {"$lastyear$": "2023", "$now$": "2999"}
"""What the kit fills in for times; the tests' clock does not matter."""


@cache
def steps() -> dict[str, Any]:
    """Return the steps of all tests; none where the data are not there, so that collecting works everywhere."""
    path = ROOT / DATA / "steps.json"
    return json.loads(path.read_text()) if path.exists() else {}


@dataclass
class Load:
    """A registry with the submissions of one test, and the ids that its queries ask for."""

    registry: Registry
    unique_ids: dict[tuple[str, str], str]
    entry_uuids: dict[tuple[str, str], str]

    def submit(self, test: str, section: str) -> None:
        [step] = steps()[test][section]
        text = shared_path(f"{DATA}/{test}/{section}/{step['files'][0]}").read_text()
        text = text.replace("$patientid$", escape(PATIENT))
        for name in set(re.findall(r"\$uniqueId:(\w+)\$", text)):
            self.unique_ids[section, name] = new_uid()
            text = text.replace(f"$uniqueId:{name}$", self.unique_ids[section, name])
        for meaning in step.get("substitute", {}).values():
            if meaning.startswith("entry UUID"):
                # The one placeholder of this kind, the target of a replacement, stands in the file as a plain UUID.
                text = re.sub(r'targetObject="urn:uuid:[^"]+"', f'targetObject="{self.find(meaning)}"', text)
        if "fresh urn:uuid" in step["ids"]:
            for name in set(re.findall(r' id="(Document\d+|SubmissionSet\d+|Folder\d*)"', text)):
                text = text.replace(f'"{name}"', f'"urn:uuid:{uuid.uuid4()}"')
        root = xml.parse(text.encode())
        objects = root.find(f"{{{uids.NS_RIM}}}RegistryObjectList")
        assert objects is not None
        submission = _with_memberships(ebrim.decode_registry_objects(objects))
        registered = self.registry.register(submission)
        names = {unique_id: name for (of, name), unique_id in self.unique_ids.items() if of == section}
        for item in (*submission.submission_sets, *submission.documents, *submission.folders):
            self.entry_uuids[section, names[item.unique_id]] = registered.entry_uuids[item.entry_uuid]

    def find(self, meaning: str) -> str:
        """Return what `entry UUID of Document01 in 12346/single_doc, step ...` means, or `unique id of ...`."""
        matched = re.match(r"(entry UUID|unique id|patient id) of (\w+) in \d+/(\w+),", meaning)
        assert matched, meaning
        kind, name, section = matched.groups()
        if kind == "patient id":
            return PATIENT
        return (self.entry_uuids if kind == "entry UUID" else self.unique_ids)[section, name]


def _with_memberships(submission: Submission) -> Submission:
    """Let each SS-HM association name the FD-DE association before it, whose id the data have lost."""
    known = {item.entry_uuid for item in submission}
    folders = {item.entry_uuid for item in submission.folders}
    associations: list[Association] = []
    for item in submission.associations:
        if item.type == uids.HAS_MEMBER and item.target not in known:
            item = replace(item, target=[each.entry_uuid for each in associations if each.source in folders][-1])
        associations.append(item)
    return replace(submission, associations=tuple(associations))


@pytest.fixture(scope="module")
def load(new_url: NewUrl) -> Iterator[Load]:
    """The five submissions of data load 12346."""
    shared_path(DATA)
    loaded = Load(Registry.open(new_url(), home_community_id=HOME), {}, {})
    for section in steps()["12346"]:
        loaded.submit("12346", section)
    yield loaded
    loaded.registry.close()


def queries() -> list[Any]:
    return [
        pytest.param(test, section, step, id=f"{test}-{section}")
        for test in ("11897", "11898", "11899", "11901", "11902", "11904", "11906", "11907")
        for section, [step, *_] in steps().get(test, {}).items()
    ] or [pytest.param("11897", "", {}, id="no-data")]


@pytest.mark.parametrize(("test", "section", "step"), queries())
def test_stored_queries_find_what_the_kit_expects(load: Load, test: str, section: str, step: dict[str, Any]) -> None:
    text = shared_path(f"{DATA}/{test}/{section}/{step['files'][0]}").read_text()
    for placeholder, meaning in step["substitute"].items():
        text = text.replace(placeholder, escape(load.find(meaning)))
    for placeholder, time in TIMES.items():
        text = text.replace(placeholder, time)
    found = load.registry.query(decode_adhoc_query(xml.parse(text.encode())))
    counts = {"ObjectRefs": len(found.refs)}
    for name, kind in {
        "Documents": DocumentEntry,
        "SubmissionSets": SubmissionSet,
        "Folders": Folder,
        "Associations": Association,
    }.items():
        counts[name] = len([item for item in decoded(found.fragments) if isinstance(item, kind)])
    wanted: dict[str, int] = {}
    for expectation in step["expect contents"]:
        name, _, number = expectation.partition("=")
        wanted |= {name: int(number)} if number else CONTENTS[name]
    assert {name: count for name, count in counts.items() if count} == {name: n for name, n in wanted.items() if n}


@pytest.mark.parametrize("section", list(steps().get("11998a", {})) or ["no-data"])
def test_submissions_without_a_required_attribute_are_refused(registry: Registry, section: str) -> None:
    shared_path(DATA)
    with pytest.raises(SubmissionRefused) as caught:
        Load(registry, {}, {}).submit("11998a", section)
    assert {error.code for error in caught.value.errors} == {"XDSRegistryMetadataError"}
