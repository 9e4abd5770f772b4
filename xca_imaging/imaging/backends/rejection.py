"""What an A-ASSOCIATE-RJ means, and what a person can do about it.

References
----------
* DICOM PS3.8, 9.3.4 and Table 9-21 (result, source, reason/diagnostic)
"""

from __future__ import annotations

from xca_imaging import settings
from xca_imaging.errors import PeerBusy, PeerError, PeerRefused
from xca_imaging.wire import pdu

# As (source, reason). `{ae}` is our AE title, `{at}` where it listens.
_MEANINGS = {
    (1, 2): "the application context name is not supported",
    (1, 3): "our calling AE title {ae!r} is not known there: add {ae!r}{at} to the PACS's list of remote AEs",
    (1, 7): "the called AE title {called!r} is not its own: correct pacs.ae_title",
    (2, 2): "the protocol version is not supported",
    (3, 1): "temporary congestion",
    (3, 2): "local limit of associations exceeded",
}
_TRANSIENT = 2  # result "rejected-transient"
_PRESENTATION = 3  # source "service-provider, presentation related": congestion and limits only


def explain(
    rejection: pdu.AssociateRJ, pacs: settings.Pacs, calling_ae_title: str, listener: tuple[str, int] | None
) -> PeerError:
    """Return PeerBusy where the PACS has no room now, else PeerRefused.

    Parameters
    ----------
    listener : tuple, optional
        Host and port of our Storage SCP.
    """
    result, source, reason = rejection.result, rejection.source, rejection.reason
    meaning = _MEANINGS.get((source, reason), "no reason given")
    at = f" at {listener[0]}:{listener[1]}" if listener else ""
    meaning = meaning.format(ae=calling_ae_title, at=at, called=pacs.ae_title)
    text = f"association rejected ({result}/{source}/{reason}): {meaning}"
    busy = result == _TRANSIENT or source == _PRESENTATION
    return PeerBusy(pacs.name, text) if busy else PeerRefused(pacs.name, text)
