"""Status and errors."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.metadata.samples import FULL, TEXT
from tests.transactions import schemas
from xca_imaging import errors, uids
from xca_imaging.errors import RegistryError
from xca_imaging.transactions.registry_response import (
    RegistryResponse,
    decode_registry_response,
    encode_registry_response,
    outcome,
    response_to,
)
from xca_imaging.wire import xml

ERROR = errors.DocumentUniqueIdError("1.2.3 is not known", "1.2.3")
WARNING = errors.ExtraMetadataNotSaved("a slot was dropped", warning=True)

ERRORS = st.builds(
    lambda code, context, location, warning: RegistryError.from_code(code, context, location, warning=warning),
    st.one_of(st.sampled_from(["XDSRepositoryError", "XDSIRequestError", "urn:dicom:wado:0007"]), FULL),
    TEXT,
    TEXT,
    st.booleans(),
)


def said(items: tuple[RegistryError, ...]) -> list[tuple[str, str, str, bool]]:
    """Return errors as values: as exceptions they are compared by identity."""
    return [(item.code, item.context, item.location, item.warning) for item in items]


@pytest.mark.parametrize(
    ("found", "met", "status"),
    [
        (0, (), uids.STATUS_SUCCESS),
        (3, (), uids.STATUS_SUCCESS),
        (0, (WARNING,), uids.STATUS_SUCCESS),
        (3, (WARNING,), uids.STATUS_SUCCESS),
        (3, (WARNING, ERROR), uids.STATUS_PARTIAL_SUCCESS),
        (1, (ERROR,), uids.STATUS_PARTIAL_SUCCESS),
        (0, (ERROR,), uids.STATUS_FAILURE),
    ],
)
def test_outcome(found, met, status):
    """TF-3 4.2.4.2: PartialSuccess needs results and an Error; warnings alone are a Success."""
    assert outcome(found, met) == status
    assert response_to(met, found=found) == RegistryResponse(status, met)
    assert response_to(met, found=found).succeeded is (status == uids.STATUS_SUCCESS)


@given(status=st.sampled_from([uids.STATUS_SUCCESS, uids.STATUS_FAILURE, "urn:x:y"]), met=st.lists(ERRORS, max_size=3))
def test_what_is_written_is_read_again(status, met):
    element = encode_registry_response(RegistryResponse(status, tuple(met)))
    decoded = decode_registry_response(xml.parse(xml.serialize(element)))
    assert decoded.status == status
    assert said(decoded.errors) == said(tuple(met))


@pytest.mark.parametrize("met", [(), (WARNING,), (ERROR,), (WARNING, ERROR)], ids=["none", "warning", "error", "both"])
def test_what_is_written_is_valid(met):
    element = encode_registry_response(response_to(met, found=1))
    schemas.assert_valid(element)
    if met:
        highest = uids.SEVERITY_ERROR if ERROR in met else uids.SEVERITY_WARNING
        assert element[0].get("highestSeverity") == highest
    else:
        assert len(element) == 0  # an empty RegistryErrorList is not valid


def test_characters_that_xml_does_not_have_are_replaced():
    """A context may quote what a PACS sent."""
    element = encode_registry_response(response_to([RegistryError("bad \x00\x1b value", "\x01")]))
    schemas.assert_valid(element)
    assert "bad ?? value" in xml.serialize(element).decode()


def _response(status: str, error: str = "") -> RegistryResponse:
    listed = f"<rs:RegistryErrorList>{error}</rs:RegistryErrorList>" if error else ""
    return decode_registry_response(
        xml.parse(
            f'<rs:RegistryResponse xmlns:rs="{uids.NS_RS}" status="{status}">{listed}</rs:RegistryResponse>'.encode()
        )
    )


@pytest.mark.parametrize("status", ["Success", "", "urn:ihe:iti:2019:CrossGatewayRetrieveDeferredResults"])
def test_an_unknown_status_is_kept_and_no_success(status):
    response = _response(status)
    assert response.status == status
    assert not response.succeeded


def test_an_unknown_code_is_kept():
    (error,) = _response(uids.STATUS_FAILURE, '<rs:RegistryError errorCode="XDSIRequestError" codeContext="c"/>').errors
    assert type(error) is RegistryError
    assert error.code == "XDSIRequestError"


def test_a_known_code_has_its_class():
    (error,) = _response(
        uids.STATUS_FAILURE, '<rs:RegistryError errorCode="XDSRepositoryBusy" codeContext="later" location="1.2"/>'
    ).errors
    assert type(error) is errors.RepositoryBusy
    assert (error.context, error.location) == ("later", "1.2")


@pytest.mark.parametrize(
    ("severity", "warning"),
    [
        (f'severity="{uids.SEVERITY_WARNING}"', True),
        (f'severity="{uids.SEVERITY_ERROR}"', False),
        ("", False),
        ('severity="urn:x:Strange"', False),
    ],
)
def test_severity(severity, warning):
    (error,) = _response(uids.STATUS_SUCCESS, f'<rs:RegistryError errorCode="x" codeContext="c" {severity}/>').errors
    assert error.warning is warning


def test_a_text_inside_is_taken_where_the_context_is_empty():
    (error,) = _response(
        uids.STATUS_FAILURE, "<rs:RegistryError errorCode='x' codeContext=''> why </rs:RegistryError>"
    ).errors
    assert error.context == "why"
