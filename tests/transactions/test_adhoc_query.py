"""ITI-18 and ITI-38: queries and their answers."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.metadata import samples
from tests.metadata.test_stored_query import QUERIES
from tests.transactions import schemas
from tests.transactions.test_registry_response import ERROR, said
from xca_imaging import uids
from xca_imaging.errors import LocalProtocolError
from xca_imaging.metadata import ebrim
from xca_imaging.metadata.model import ObjectRef, Submission
from xca_imaging.transactions import adhoc_query, iti18, iti38
from xca_imaging.transactions.adhoc_query import QueryResponse
from xca_imaging.transactions.registry_response import response_to
from xca_imaging.wire import xml

HOME = "urn:oid:1.3.6.1.4.1.21367.2017.1"
REFS = (ObjectRef("urn:uuid:1", HOME), ObjectRef("urn:uuid:2"))


@settings(max_examples=25)
@given(query=QUERIES, module=st.sampled_from([iti18, iti38]))
def test_a_request_is_read_again(query, module):
    assert module.decode_request(xml.parse(xml.serialize(module.encode_request(query)))) == query


@settings(
    max_examples=20,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)
@given(submission=samples.SUBMISSIONS, module=st.sampled_from([iti18, iti38]))
def test_an_answer_is_read_again(submission, module):
    response = QueryResponse(uids.STATUS_SUCCESS, (), replace(submission, object_refs=()), submission.object_refs)
    decoded = module.decode_response(xml.parse(xml.serialize(module.encode_response(response))))
    assert decoded == response
    assert decoded.problems == ()


_ANSWERS = {
    "objects": QueryResponse(uids.STATUS_SUCCESS, (), samples.WITH_FOLDER),
    "references": QueryResponse(uids.STATUS_SUCCESS, (), Submission(), REFS),
    "nothing": QueryResponse(uids.STATUS_SUCCESS),
    "partial": QueryResponse(uids.STATUS_PARTIAL_SUCCESS, (ERROR,), samples.SUBMISSION),
    "failure": QueryResponse(uids.STATUS_FAILURE, (ERROR,)),
}


@pytest.mark.parametrize("name", _ANSWERS)
def test_answers_are_valid(name):
    """The RegistryObjectList is there in each, also in a failure."""
    response = _ANSWERS[name]
    element = iti18.encode_response(response)
    schemas.assert_valid(element)
    assert element.find(xml.qname(uids.NS_RIM, "RegistryObjectList")) is not None
    decoded = iti18.decode_response(element)
    assert (decoded.status, decoded.objects, decoded.refs) == (response.status, response.objects, response.refs)
    assert said(decoded.errors) == said(response.errors)
    assert decoded.succeeded is (response.status == uids.STATUS_SUCCESS)


def _fragments(submission: Submission) -> list[bytes]:
    return [xml.serialize(ebrim.encode_object(item)) for item in submission]


@pytest.mark.parametrize("submission", [Submission(), samples.SUBMISSION, samples.WITH_FOLDER], ids=["0", "3", "6"])
@pytest.mark.parametrize("met", [(), (ERROR,)], ids=["success", "errors"])
def test_an_answer_of_fragments_is_the_same_answer(submission, met):
    count = len(list(submission))
    response = response_to(met, found=count)
    pieces = list(iti18.encode_response_fragments(response, _fragments(submission)))
    assert len(pieces) == count + 2
    body = xml.parse(b"".join(pieces))
    schemas.assert_valid(body)
    decoded = iti18.decode_response(body)
    assert (decoded.status, decoded.objects) == (response.status, submission)
    assert said(decoded.errors) == said(response.errors)


def test_a_gateway_marks_every_object_with_its_home():
    """ITI TF-2 3.38.4.1.3; a home that stood there before is replaced."""
    foreign = replace(samples.ENTRY, home_community_id="urn:oid:9.9")
    submission = replace(samples.WITH_FOLDER, documents=(foreign,))
    pieces = iti38.encode_response_fragments(response_to(found=6), _fragments(submission), home_community_id=HOME)
    body = xml.parse(b"".join(pieces))
    schemas.assert_valid(body)
    decoded = iti38.decode_response(body).objects
    assert {item.home_community_id for item in decoded} == {HOME}
    assert decoded == Submission(
        submission_sets=tuple(replace(item, home_community_id=HOME) for item in submission.submission_sets),
        documents=tuple(replace(item, home_community_id=HOME) for item in submission.documents),
        folders=tuple(replace(item, home_community_id=HOME) for item in submission.folders),
        associations=tuple(replace(item, home_community_id=HOME) for item in submission.associations),
    )


def test_a_gateway_marks_references_too():
    fragments = [xml.serialize(ebrim.encode_reference(ref)) for ref in REFS]
    pieces = iti38.encode_response_fragments(response_to(found=2), fragments, home_community_id="urn:oid:1.5")
    refs = iti38.decode_response(xml.parse(b"".join(pieces))).refs
    assert refs == (ObjectRef("urn:uuid:1", "urn:oid:1.5"), ObjectRef("urn:uuid:2", "urn:oid:1.5"))


def test_the_home_of_a_fragment_is_set_in_its_start_tag_only():
    entry = replace(samples.ENTRY, title='a home="urn:oid:9.9" > b', entry_uuid="x> home='y'")
    changed = adhoc_query.set_home(xml.serialize(ebrim.encode_object(entry)), 'urn:oid:1.2&"<')
    assert ebrim.decode_object(xml.parse(changed)) == replace(entry, home_community_id='urn:oid:1.2&"<')


@pytest.mark.parametrize("fragment", [b"", b"text", b" <rim:ExtrinsicObject/>"])
def test_what_is_no_fragment(fragment):
    with pytest.raises(LocalProtocolError):
        adhoc_query.set_home(fragment, HOME)


def test_a_failure_without_list_is_read():
    text = f'<query:AdhocQueryResponse xmlns:query="{uids.NS_QUERY}" status="{uids.STATUS_FAILURE}"/>'
    assert iti18.decode_response(xml.parse(text.encode())) == QueryResponse(uids.STATUS_FAILURE)


def test_an_object_with_a_flaw_does_not_spoil_the_answer():
    element = iti18.encode_response(QueryResponse(uids.STATUS_SUCCESS, (), samples.SUBMISSION))
    (size,) = element.xpath("//*[@name='size']/*/*")
    size.text = "2 KB"
    decoded = iti18.decode_response(element)
    assert decoded.objects.documents == (replace(samples.ENTRY, size=None),)
    assert [problem.context for problem in decoded.problems] == [
        f"DocumentEntry {samples.ENTRY_UUID}: size '2 KB' is not a number of bytes"
    ]
