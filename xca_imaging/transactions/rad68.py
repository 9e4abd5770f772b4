"""RAD-68 Provide and Register Imaging Document Set: a source hands an imaging manifest to a repository.

On the wire it is ITI-41, action and body; what is inside makes it RAD-68: DICOM objects, of which a Key Object
Selection document is the manifest of a study.

References
----------
* IHE RAD TF-2, 4.68; IHE ITI TF-2, 3.41
"""

from __future__ import annotations

from xca_imaging import uids
from xca_imaging.transactions.iti41 import decode_request, decode_response, encode_request, encode_response
from xca_imaging.transactions.submission import ProvideRequest
from xca_imaging.transactions.table import RAD68 as TRANSACTION

__all__ = ["TRANSACTION", "decode_request", "decode_response", "encode_request", "encode_response", "is_imaging"]


def is_imaging(request: ProvideRequest) -> bool:
    """Whether a provided set holds a DICOM object: the log and the audit record then name RAD-68."""
    return any(entry.mime_type == uids.MIME_DICOM for entry in request.submission.documents)
