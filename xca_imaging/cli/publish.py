"""Publish studies of the PACSs: C-FIND, KOS manifest, RAD-68."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping
from datetime import date, datetime
from functools import partial

from rich.console import Console
from rich.table import Table

from xca_imaging import settings as settings_module
from xca_imaging.cli.options import add_config, patient_identifier, run_loop, uid
from xca_imaging.errors import ConfigurationError, DocumentUniqueIdError, PeerError, RegistryError
from xca_imaging.gateway import listeners
from xca_imaging.gateway.peers import Endpoint, SoapClient
from xca_imaging.gateway.publishing import Published, Selection, publish
from xca_imaging.imaging.backends.cfind import Finder
from xca_imaging.imaging.profile import load_profile
from xca_imaging.metadata.model import Identifier, Submission
from xca_imaging.metadata.stored_query import StoredQuery
from xca_imaging.security import tls
from xca_imaging.settings import Settings
from xca_imaging.transactions.adhoc_query import QueryResponse
from xca_imaging.transactions.document_set import DocumentRequest
from xca_imaging.transactions.registry_response import RegistryResponse
from xca_imaging.uids import OID_PREFIX

log = logging.getLogger(__name__)


def configure(sub: argparse.ArgumentParser) -> None:
    add_config(sub)
    what = sub.add_mutually_exclusive_group(required=True)
    what.add_argument("--study", type=uid, metavar="UID")
    what.add_argument("--patient", metavar="ID", help="all studies with this Patient ID (0010,0020)")
    what.add_argument("--since", type=_date, metavar="DATE", help="all studies from this day on: 2026-01-31")
    sub.add_argument(
        "--as",
        dest="as_patient",
        type=patient_identifier,
        metavar="'ID^^^&OID&ISO'",
        help="the registry's patient id; default: the images' own, with their issuer or the PACS's domain",
    )


def run(args: argparse.Namespace) -> int:
    settings = settings_module.load(args.config)
    selection = Selection(study_instance_uid=args.study or "", patient_id=args.patient or "", since=args.since)
    results = run_loop(publish_all(settings, selection, args.as_patient))
    if not results:
        print("no study fits")
        return 1
    table = Table("study", "series", "instances", "result", "manifest", box=None, pad_edge=False)
    for each in results:
        table.add_row(
            each.study_instance_uid,
            str(each.series),
            str(each.instances),
            f"{each.outcome}: {each.reason}" if each.reason else each.outcome,
            each.document_unique_id,
        )
    console = Console()
    if not console.is_terminal:
        console = Console(width=240)  # for a pipe: one line a study
    console.print(table, highlight=False, markup=False)
    return 1 if any(each.outcome == "refused" for each in results) else 0


async def publish_all(settings: Settings, selection: Selection, patient_id: str | None = None) -> list[Published]:
    """Publish what fits from every PACS, and say what became of each study.

    A study that one PACS does not have is refused only when none has it; a PACS that cannot be asked does not keep
    the others back.

    Raises
    ------
    ConfigurationError, PeerError
    """
    if not settings.pacs:
        raise ConfigurationError(str(settings.file), "pacs", "there is none", "add [[pacs]]")
    identifier = None
    if patient_id:
        number, _, authority = patient_id.partition("^^^")
        identifier = Identifier(number, authority.split("&")[1])
    dicom_tls = tls.client_context(settings, settings.dicom.tls, "dicom.tls")
    https = tls.client_context(settings, settings.http.tls, "http.tls")
    results: list[Published] = []
    unreachable: list[PeerError] = []
    async with SoapClient(tls=https) as client:
        for pacs in settings.pacs:
            try:
                results += await publish(
                    pacs,
                    selection,
                    finder=Finder(pacs, settings.dicom.ae_title, dicom_tls),
                    repository=_Repository(settings, client),
                    profile=load_profile(settings),
                    source_id=settings.node.home_community_id.removeprefix(OID_PREFIX),
                    patient_id=identifier,
                )
            except PeerError as exc:
                unreachable.append(exc)
                log.warning("not asked: %s", exc)
    if not results and unreachable:
        raise unreachable[0]
    # Which PACS has the study is not the operator's question, unless none of them published it.
    published = [each for each in results if each.outcome != "refused"]
    return published if selection.study_instance_uid and published else results


class _Repository:
    """This node's endpoints, or `publish.repository` with this node's registry."""

    def __init__(self, settings: Settings, client: SoapClient) -> None:
        base = partial(listeners.base_url, settings)
        timeout = settings.limits.stall_timeout
        self._client = client
        self._registry = Endpoint(settings.node.name, f"{base()}/services/registry", timeout)
        own = Endpoint(settings.node.name, f"{base()}/services/repository", timeout)
        url = settings.publish.repository
        self._repository = Endpoint(url, url, timeout) if url else own

    async def stored_query(self, query: StoredQuery) -> QueryResponse:
        return await self._client.stored_query(self._registry, query)

    async def retrieve_document(self, repository_unique_id: str, document_unique_id: str) -> bytes:
        wanted = DocumentRequest(None, repository_unique_id, document_unique_id)
        response, contents = await self._client.retrieve_documents(self._repository, [wanted])
        if document_unique_id not in contents:
            errors: tuple[RegistryError, ...] = response.registry.errors
            raise errors[0] if errors else DocumentUniqueIdError("the answer does not hold it", document_unique_id)
        return contents[document_unique_id]

    async def provide_and_register(self, submission: Submission, documents: Mapping[str, bytes]) -> RegistryResponse:
        return await self._client.provide_and_register(self._repository, submission, documents)


def _date(text: str) -> date:
    try:
        return datetime.strptime(text.replace("-", ""), "%Y%m%d").date()
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a date: write 2026-01-31") from None
