"""ITI-42, ITI-41 and RAD-68: metadata registered, documents provided."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.metadata import samples
from tests.support.shared import shared_path
from tests.transactions import schemas
from tests.transactions.test_document_set import CONTENTS
from tests.transactions.test_registry_response import ERROR, WARNING, said
from xca_imaging import uids
from xca_imaging.errors import MalformedMessage, MessageTooLarge, SubmissionRefused
from xca_imaging.metadata.model import Submission
from xca_imaging.transactions import iti41, iti42, rad68, submission
from xca_imaging.transactions.registry_response import response_to
from xca_imaging.transactions.submission import ProvideRequest
from xca_imaging.wire import xml
from xca_imaging.wire.mtom import Reference

_SLOW = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
PROVIDED = ProvideRequest(samples.WITH_FOLDER, {samples.ENTRY_UUID: Reference("kos@example")})


@settings(max_examples=15, suppress_health_check=_SLOW)
@given(registered=samples.SUBMISSIONS)
def test_a_registration_is_read_again(registered):
    assert iti42.decode_request(xml.parse(xml.serialize(iti42.encode_request(registered)))) == registered


@settings(max_examples=15, suppress_health_check=_SLOW)
@given(
    registered=samples.SUBMISSIONS,
    documents=st.dictionaries(samples.IDS, CONTENTS, max_size=3),
    module=st.sampled_from([iti41, rad68]),
)
def test_provided_documents_are_read_again(registered, documents, module):
    request = ProvideRequest(registered, documents)
    assert module.decode_request(xml.parse(xml.serialize(module.encode_request(request)))) == request


def test_requests_are_valid():
    schemas.assert_valid(iti42.encode_request(samples.WITH_FOLDER))
    schemas.assert_valid(iti41.encode_request(PROVIDED))
    schemas.assert_valid(iti41.encode_request(ProvideRequest(samples.SUBMISSION, {})))


@pytest.mark.parametrize("errors", [(), (WARNING,), (ERROR, WARNING)], ids=["success", "warning", "failure"])
@pytest.mark.parametrize("module", [iti41, iti42, rad68], ids=lambda module: module.TRANSACTION.name)
def test_answers(module, errors):
    element = module.encode_response(response_to(errors))
    schemas.assert_valid(element)
    decoded = module.decode_response(element)
    assert said(decoded.errors) == said(errors)
    assert decoded.succeeded is (ERROR not in errors)


def test_documents_and_entries_that_have_no_partner():
    assert PROVIDED.unmatched() == []
    lost = ProvideRequest(samples.SUBMISSION, {"Document09": b""}).unmatched()
    assert [error.code for error in lost] == ["XDSMissingDocument", "XDSMissingDocumentMetadata"]
    assert samples.ENTRY_UUID in lost[0].context
    assert "Document09" in lost[1].context


def test_an_on_demand_entry_has_no_document():
    entry = replace(samples.ENTRY, object_type=uids.ON_DEMAND_DOCUMENT)
    assert ProvideRequest(Submission(documents=(entry,)), {}).unmatched() == []


def test_a_set_with_a_dicom_object_is_rad68():
    assert rad68.is_imaging(PROVIDED)
    report = replace(samples.ENTRY, mime_type="application/pdf")
    assert not rad68.is_imaging(ProvideRequest(Submission(documents=(report,)), {}))


def test_wrong_metadata_refuse_the_submission_with_the_code_of_who_found_it():
    for module, request, code in (
        (iti42, samples.SUBMISSION, "XDSRegistryMetadataError"),
        (iti41, ProvideRequest(samples.SUBMISSION, {}), "XDSRepositoryMetadataError"),
    ):
        element = module.encode_request(request)
        (size,) = element.xpath("//*[@name='size']/*/*")
        size.text = "many"
        with pytest.raises(SubmissionRefused) as refused:
            module.decode_request(element)
        assert [error.code for error in refused.value.errors] == [code]


def test_two_documents_with_one_id():
    element = iti41.encode_request(PROVIDED)
    second = element[-1].__copy__()
    element.append(second)
    with pytest.raises(SubmissionRefused, match="two documents have the id"):
        iti41.decode_request(element)


def test_what_is_no_submission():
    element = iti42.encode_request(samples.SUBMISSION)
    element.remove(element[0])
    with pytest.raises(MalformedMessage, match="RegistryObjectList"):
        iti42.decode_request(element)
    provided = iti41.encode_request(PROVIDED)
    provided.remove(provided[0])
    with pytest.raises(MalformedMessage, match="SubmitObjectsRequest"):
        iti41.decode_request(provided)


def test_the_objects_of_a_submission_are_bounded():
    element = iti42.encode_request(samples.SUBMISSION)
    assert submission.decode_submit_request(element, max_objects=3) == samples.SUBMISSION
    with pytest.raises(MessageTooLarge, match="more than 2 objects"):
        submission.decode_submit_request(element, max_objects=2)


def test_submissions_of_the_conformance_data():
    """What is valid against the published schema is valid against ours, and what we make of it against both."""
    published = schemas.published()
    assert published is not None or not shared_path("schemas/nist-v3")
    for file in sorted(shared_path("conformance/data/iti").glob("*/*/*.submission.xml")):
        body = xml.parse(file.read_bytes())
        schemas.assert_valid(body)
        schemas.assert_valid(iti42.encode_request(iti42.decode_request(body)))
