"""rig_2018: the node as Responding Imaging Gateway (RAD-75 in).

In this version the source E is a PACS of the node itself: what reaches a source of another vendor by RAD-69 cannot be
looked at, what comes back to the asking community can.
"""

from __future__ import annotations

from conformance.environment import HOME, SOURCE_E, Environment, check_documents, check_failure
from tests.support import soap_client
from tests.support.soap_client import RAD75


def retrieve(environment: Environment, name: str) -> None:
    """5421a, 5421b: one image, two studies at E."""
    body = environment.body(name)
    answer = soap_client.send(environment.node, RAD75, body)
    check_documents(answer, environment, body, repository=SOURCE_E, home=HOME)


def refused(environment: Environment, name: str, code: str) -> None:
    """5424b, 5424c: an unknown instance, an unknown source; the location is this community."""
    answer = soap_client.send(environment.node, RAD75, environment.body(name))
    check_failure(answer, code)
    assert {error.location for error in answer.errors} == {HOME}


FAMILY = "responding imaging gateway"
CASES = {
    "rig_2018-5421a": lambda e: retrieve(e, "rad75-one-image.xml"),
    "rig_2018-5421b": lambda e: retrieve(e, "rad75-two-studies.xml"),
    "rig_2018-5424b": lambda e: refused(e, "rad75-unknown-instance.xml", "XDSDocumentUniqueIdError"),
    "rig_2018-5424c": lambda e: refused(e, "rad75-unknown-source.xml", "XDSUnknownRepositoryId"),
    "rig_2018-5421a (RAD-69 to the source)": None,
}
