"""The data-driven cases: what `steps.json` says is sent, filled in and expected.

Two things of the published data are made good while a submission is prepared, since they come from a kit that numbers
the objects anew: an association of a submission set whose target is a UUID that stands nowhere means the folder's own
association before it, and the replacement of the data load 12346 means the entry of its step `doc_for_rplc`.
"""

from __future__ import annotations

import json
import re
import time
import uuid
from dataclasses import dataclass, field
from hashlib import sha1
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from lxml import etree

from conformance import contents
from conformance.environment import AUTHORITY, DATA, HOME, Environment
from tests.support import images, soap_client
from tests.support.soap_client import RIM, XDSB, Part

UNIQUE_ID_SCHEMES = {
    "urn:uuid:2e82c1f6-a085-4c72-9da3-8640a32e42ab",
    "urn:uuid:96fdda7c-d067-4183-912e-bf5ee74998a8",
    "urn:uuid:75df8f67-9973-4fbe-a900-df66cefecc5a",
}
PATIENT_ID_SCHEMES = {
    "urn:uuid:58a6f841-87b3-4a3e-92fd-a8ffeff98427",
    "urn:uuid:6b5aea1a-874d-4603-a4bc-96a0a7b38446",
    "urn:uuid:f64ffdf0-4b97-4e06-b79f-a52b38ec2f8a",
}
RPLC = "urn:ihe:iti:2007:AssociationType:RPLC"
FRESH_IDS = "give every object a fresh urn:uuid id before sending"

TRANSACTIONS = {
    "ITI-18": soap_client.ITI18,
    "ITI-38": soap_client.ITI38,
    "ITI-39": soap_client.ITI39,
    "ITI-41": soap_client.ITI41,
    "ITI-42": soap_client.ITI42,
    "ITI-43": soap_client.ITI43,
}
# the element that the kit collects answers of a transaction in: its XPath expressions name it
COLLECTED = {
    "ITI-18": "StoredQueryTransaction",
    "ITI-38": "XCQTransaction",
    "ITI-39": "XCRTransaction",
    "ITI-43": "RetrieveTransaction",
    "ITI-18 to the initiating gateway": "IGQTransaction",
    "ITI-43 to the initiating gateway": "IGRTransaction",
}
# the names by which steps refer to identifiers of a submission: object, kind
NAMES = {
    "docid": ("Document01", "id"),
    "ssuid": ("SubmissionSet01", "uid"),
    "folid": ("Folder", "id"),
    "foluid": ("Folder", "uid"),
    "uid": ("Document01", "uid"),
    "Document01_uid": ("Document01", "uid"),
    "Document02_uid": ("Document02", "uid"),
    "mimeType": ("Document01", "mime"),
}
# sections of the kit that the published sample left out, with those that stand for them
STANDS_FOR = {"15811/TwoDocFindDocuments": "15811/OneDocFindDocuments"}
SAME_NAME = {"home1": "home", "mimeType1": "mimeType"}

# Each of these sections is a data load of its own patient: a query for the one must not find the other's.
OWN_PATIENT = {"15807"}


@dataclass
class Sent:
    """What a step sent and took: identifiers by object, values by name, documents by unique id."""

    objects: dict[str, dict[str, str]] = field(default_factory=dict)
    values: dict[str, str] = field(default_factory=dict)


class Steps:
    """The sections of `steps.json`, run in order against one node."""

    def __init__(self, environment: Environment) -> None:
        self.environment = environment
        self.tests: dict[str, Any] = json.loads((DATA / "iti" / "steps.json").read_text())
        # mutable: what earlier steps sent, the patients given out, the documents and entries seen
        self.sent: dict[tuple[str, str], Sent] = {}
        self.patients: dict[str, str] = {}
        self.documents: dict[str, bytes] = {}
        self.registered: dict[str, Any] = {}
        self.mime_types: dict[str, str] = {}

    def sections(self, test: str) -> list[str]:
        return list(self.tests[test])

    def run(self, test: str, section: str) -> None:
        """Run one section; an AssertionError says which step did not do as expected."""
        collected = etree.Element("TestResults")
        for step in self.tests[test][section]:
            try:
                self._step(test, section, step, collected)
            except AssertionError as exc:
                raise AssertionError(f"step {step['step']}: {exc}") from exc
            except Missing as exc:
                raise AssertionError(f"step {step['step']}: needs {exc}, which did not succeed") from exc

    # --- one step ---------------------------------------------------------------------------------------------------

    def _step(self, test: str, section: str, step: dict[str, Any], collected: etree._Element) -> None:
        here = self.sent.setdefault((f"{test}/{section}", step["step"]), Sent())
        fill = {key: self._value(test, section, text) for key, text in step.get("substitute", {}).items()}
        if "send" in step:
            answer = self._send(test, section, step, fill, here)
            self._collect(step, answer, collected)
            self._expect(test, section, step, answer)
            for name, path in step.get("take from answer (XPath)", {}).items():
                found = answer.body.xpath(path)
                assert found, f"nothing at {path}"
                here.values[name] = found[0] if isinstance(found[0], str) else found[0].text
        for expression in step.get("expect (XPath on the collected answers)", []):
            filled = expression
            for name, value in fill.items():
                filled = filled.replace(name, value)
            assert collected.getroottree().xpath(filled), f"not true: {filled}"

    def _send(
        self, test: str, section: str, step: dict[str, Any], fill: dict[str, str], here: Sent
    ) -> soap_client.Answer:
        folder = DATA / "iti" / test / section
        files = [folder / name for name in step["files"]]
        name = step["send"]
        transaction = TRANSACTIONS[name.split()[0]]
        path = "/services/initiating-gateway" if "initiating gateway" in name else ""
        parts: list[Part] = []
        if name in ("ITI-41", "ITI-42"):
            body, parts = self._submission(test, section, step, files, fill, here)
        else:
            (file,) = files
            body = file.read_text()
            now = time.gmtime()
            fill = {
                "$now$": time.strftime("%Y%m%d%H%M%S", time.gmtime(time.time() + 60)),
                "$lastyear$": f"{now.tm_year - 1}0101",
                **fill,
            }
            for key, value in fill.items():
                body = body.replace(key, escape(value))
            left = re.findall(r"\$(?!XDS|uuid|patientId|Assoc|Metadata)\w+\$", body)
            assert not left, f"placeholders without a value: {left}"
            root = soap_client.parse_xml(body.encode())
            body = etree.tostring(root, encoding="unicode")
            for label, element in (
                ("home_request", "HomeCommunityId"),
                ("repid_request", "RepositoryUniqueId"),
                ("docuid_request", "DocumentUniqueId"),
            ):
                found = root.find(f".//{{{XDSB}}}{element}")
                if found is not None:
                    here.values[label] = found.text or ""
        return soap_client.send(self.environment.node, transaction, body, parts=parts, path=path)

    def _submission(
        self, test: str, section: str, step: dict[str, Any], files: list[Path], fill: dict[str, str], here: Sent
    ) -> tuple[str, list[Part]]:
        """Return the body and the attachments of ITI-41 or ITI-42."""
        (file,) = [each for each in files if each.name.endswith(".submission.xml")]
        text = file.read_text()
        patient = self._patient(test, section, known="patient" not in step)
        text = text.replace("$patientid$", escape(patient))
        fresh: dict[str, str] = {}
        for placeholder, name in re.findall(r"(\$uniqueId:(\w+)\$)", text):
            text = text.replace(placeholder, fresh.setdefault(name, images.new_uid()))
        for key, value in fill.items():
            text = text.replace(key, escape(value))
        root = soap_client.parse_xml(text.encode())
        objects = list(root.iter(f"{{{RIM}}}ExtrinsicObject", f"{{{RIM}}}RegistryPackage"))
        symbolic = {id(each): each.get("id") for each in objects}
        self._mend(root, fill)
        if step.get("ids") == FRESH_IDS:
            _number_anew(root)
        for each in objects:
            facts = {"id": each.get("id"), "mime": each.get("mimeType", "")}
            for identifier in each.iter(f"{{{RIM}}}ExternalIdentifier"):
                if identifier.get("identificationScheme") in UNIQUE_ID_SCHEMES:
                    facts["uid"] = identifier.get("value")
                elif identifier.get("identificationScheme") in PATIENT_ID_SCHEMES:
                    facts["patient"] = identifier.get("value")
            here.objects[symbolic[id(each)]] = facts
        body = etree.tostring(root, encoding="unicode")
        if step["send"] == "ITI-42":
            return body, []
        parts, elements = [], []
        for each in files:
            match = re.search(r"\.(Document\d+)\.bin$", each.name)
            if match is None:
                continue
            facts = here.objects[match[1]]
            content = each.read_bytes()
            self.documents[facts["uid"]] = content
            self.mime_types[facts["uid"]] = facts["mime"]
            part = Part(f"{uuid.uuid4()}@conformance.invalid", content, facts["mime"])
            parts.append(part)
            elements.append(f'<x:Document id="{facts["id"]}">{soap_client.include(part.content_id)}</x:Document>')
        wrapped = (
            f'<x:ProvideAndRegisterDocumentSetRequest xmlns:x="{XDSB}">{body}{"".join(elements)}'
            "</x:ProvideAndRegisterDocumentSetRequest>"
        )
        return wrapped, parts

    @staticmethod
    def _mend(root: etree._Element, fill: dict[str, str]) -> None:
        """Make good what the kit's own numbering of objects left in the published files."""
        ids = {each.get("id") for each in root.iter() if each.get("id")}
        sets = {
            each.get("classifiedObject")
            for each in root.iter()
            if each.get("classificationNode") == contents.SUBMISSION_SET
        }
        previous = None
        for association in root.iter(f"{{{RIM}}}Association"):
            source, target = association.get("sourceObject"), association.get("targetObject")
            dangling = target.startswith("urn:uuid:") and target not in ids
            if association.get("associationType") == RPLC and "$rplc_doc_uuid$" in fill:
                association.set("targetObject", fill["$rplc_doc_uuid$"])
            elif dangling and source in sets and previous is not None:
                association.set("targetObject", previous)
            if source not in sets and association.get("associationType") == contents.HAS_MEMBER:
                previous = association.get("id")

    # --- expectations -----------------------------------------------------------------------------------------------

    def _expect(self, test: str, section: str, step: dict[str, Any], answer: soap_client.Answer) -> None:
        status = {"Success": soap_client.SUCCESS, "Failure": soap_client.FAILURE}[step["expect status"]]
        codes = [f"{error.code} ({error.context})" for error in answer.errors]
        assert answer.registry_status == status, f"{answer.registry_status.rpartition(':')[2]}: {'; '.join(codes)}"
        if status == soap_client.FAILURE:
            assert answer.errors, "a failure without a RegistryError"
            assert not answer.body.findall(f".//{{{XDSB}}}DocumentResponse")
        if code := step.get("expect error code"):
            assert code in {error.code for error in answer.errors}, codes
        if step["send"].startswith(("ITI-18", "ITI-38")):
            for entry in answer.entries:
                self._remember(entry)
        contents_expected = step.get("expect contents", [])
        if contents_expected:
            contents.check(answer.body, contents_expected)
        if "expect documents" in step:
            self._expect_documents(step, answer)

    def _remember(self, entry: etree._Element) -> None:
        for identifier in entry.iter(f"{{{RIM}}}ExternalIdentifier"):
            if identifier.get("identificationScheme") in UNIQUE_ID_SCHEMES:
                self.registered[identifier.get("value")] = entry

    def _expect_documents(self, step: dict[str, Any], answer: soap_client.Answer) -> None:
        assert answer.documents, "no document"
        for unique_id, document in answer.documents.items():
            assert document.content == self.documents[unique_id], f"{unique_id} differs from what was submitted"
            assert document.mime_type == step.get("expect mime type", self.mime_types[unique_id])
            entry = self.registered.get(unique_id)
            if entry is None:
                continue
            slots = {
                each.get("name"): each.findtext(f"{{{RIM}}}ValueList/{{{RIM}}}Value")
                for each in entry.findall(f"{{{RIM}}}Slot")
            }
            assert slots["size"] == str(len(document.content))
            assert slots["hash"].lower() == sha1(document.content, usedforsecurity=False).hexdigest()
            assert slots["repositoryUniqueId"] == document.repository
            assert entry.get("mimeType") == document.mime_type

    @staticmethod
    def _collect(step: dict[str, Any], answer: soap_client.Answer, collected: etree._Element) -> None:
        """Keep an answer in the form that the kit's XPath expressions walk."""
        name = COLLECTED.get(step["send"])
        if name is None:
            return
        holder = etree.SubElement(etree.SubElement(collected, "TestStep", id=step["step"]), name, step=step["step"])
        etree.SubElement(holder, "Result").append(soap_client.parse_xml(etree.tostring(answer.body)))

    # --- values -----------------------------------------------------------------------------------------------------

    def _patient(self, test: str, section: str, *, known: bool = True) -> str:
        """Return the patient of a test: fresh, of the affinity domain; or one that the registry does not know."""
        if not known:
            # patients are known by their domain: this registry has no identity feed
            return f"{images.new_patient('UNKNOWN')}^^^&1.3.6.1.4.1.21367.2005.13.20.3000&ISO"
        key = f"{test}/{section}" if test in OWN_PATIENT else test
        return self.patients.setdefault(key, f"{images.new_patient('CONF')}^^^&{AUTHORITY}&ISO")

    def _value(self, test: str, section: str, text: str) -> str:
        """Return what a phrase of `steps.json` means."""
        if text == "a patient known to the registry":
            return self._patient(test, section)
        if text == "home community id of the community under test":
            return HOME
        if match := re.fullmatch(r"(unique id|entry UUID|patient id) of (\w+) in (\S+), step (\S+)", text):
            kind = {"unique id": "uid", "entry UUID": "id", "patient id": "patient"}[match[1]]
            return self._sent(match[3], match[4]).objects[match[2]][kind]
        if match := re.fullmatch(r"(\w+) from (\S+), step (\S+)", text):
            sent = self._sent(STANDS_FOR.get(match[2], match[2]), match[3])
            name = SAME_NAME.get(match[1], match[1])
            if name in sent.values:
                return sent.values[name]
            if name not in NAMES or NAMES[name][0] not in sent.objects:
                raise Missing(text)
            object_name, kind = NAMES[name]
            return sent.objects[object_name][kind]
        raise ValueError(f"not a value of steps.json: {text!r}")

    def _sent(self, section: str, step: str) -> Sent:
        sent = self.sent.get((section, step))
        if sent is None or not (sent.objects or sent.values):
            raise Missing(f"{section}, step {step}")
        return sent


class Missing(Exception):
    """An earlier step did not leave the value that this one needs."""


def _number_anew(root: etree._Element) -> None:
    """Give every object a fresh UUID and let the references follow."""
    fresh = {each.get("id"): f"urn:uuid:{uuid.uuid4()}" for each in root.iter() if each.get("id")}
    for each in root.iter():
        for name in ("id", "classifiedObject", "registryObject", "sourceObject", "targetObject"):
            if each.get(name) in fresh:
                each.set(name, fresh[each.get(name)])
