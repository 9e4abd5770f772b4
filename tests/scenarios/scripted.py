"""Requests for what a scripted PACS holds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from tests.scenarios.holding import STORED_SYNTAXES, rad69
from tests.support import soap_client
from tests.support.node import RETRIEVE_LOCATION, Node
from xca_imaging.imaging.ledger import Want


class Named(NamedTuple):
    """An instance as `soap_client` takes it."""

    study: str
    series: str
    uid: str


def as_instances(wants: Iterable[Want]) -> list[Named]:
    return [Named(want.study_instance_uid, want.series_instance_uid, want.sop_instance_uid) for want in wants]


def rad69_of(node: Node, wants: Iterable[Want]) -> soap_client.Answer:
    """Ask for instances and return the answer."""
    return rad69(node, as_instances(wants))


def rad69_request(node: Node, wants: Iterable[Want], *, version: str = "1.1") -> bytes:
    """Return the bytes of a request over HTTP."""
    return rad69_request_of(node, as_instances(wants)).replace(b"HTTP/1.1", f"HTTP/{version}".encode(), 1)


def rad69_request_of(node: Node, instances: Iterable[Any]) -> bytes:
    """Return the same for objects with `study`, `series` and `uid`."""
    body = soap_client.retrieve_images(instances, repository=RETRIEVE_LOCATION, transfer_syntaxes=STORED_SYNTAXES)
    block = soap_client.headers_block(
        soap_client.RAD69.action, node.url(soap_client.RAD69.path), message_id=soap_client.new_message_id()
    )
    content_type, data = soap_client.package(soap_client.envelope(body, block))
    return soap_client.http_request(soap_client.RAD69.path, {"Content-Type": content_type}, data)
