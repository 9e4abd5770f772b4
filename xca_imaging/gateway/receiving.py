"""A sibling process that receives instances for a node: `python -m xca_imaging.gateway.receiving [CONFIG] FD FD`.

Started by the node, which hands it two descriptors, for messages and for connections. With a configuration file it
speaks DICOM over TLS as `[dicom.tls]` says; everything else it is told by message.
"""

from __future__ import annotations

import logging
import ssl
import sys
from pathlib import Path

import uvloop

from xca_imaging import settings as settings_module
from xca_imaging.imaging import sibling
from xca_imaging.operations.heap import freeze_heap
from xca_imaging.security import tls


def main(arguments: list[str]) -> None:
    """Serve until the node is gone."""
    *config, messages_fd, sockets_fd = arguments
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    context: ssl.SSLContext | None = None
    if config:
        settings = settings_module.load(Path(config[0]))
        context = tls.server_context(settings, settings.dicom.tls, "dicom.tls")
    freeze_heap()
    uvloop.run(sibling.serve(int(messages_fd), int(sockets_fd), ssl=context))


if __name__ == "__main__":
    main(sys.argv[1:])
