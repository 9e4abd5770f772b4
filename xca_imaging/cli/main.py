"""The `xca-imaging` command.

Exit codes: 0 all was right; 1 it was tried and failed, or not everything arrived; 2 usage or configuration is wrong.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
from collections.abc import Sequence

from xca_imaging import __version__
from xca_imaging.errors import ConfigurationError, ConnectFailed, RegistryError, SubmissionRefused, XcaImagingError

# Only the verb that is called is imported: a node's libraries take a second to load, which `check-config` does not
# wait for.
_VERBS = {
    "serve": "run a node until SIGTERM or SIGINT",
    "demo": "two communities and a PACS with real images on this machine",
    "check-config": "say what is wrong with a configuration, with file, key and a hint",
    "echo": "say whether every PACS and community can be reached, and how long certificates are valid",
    "publish": "publish studies of the PACSs: C-FIND, KOS manifest, RAD-68",
    "query": "list a patient's imaging documents, of this node's registry or of another community",
    "drift": "say where the registry and the PACSs disagree about studies",
    "retrieve": "fetch manifests and retrieve every image they name, checked, with a receipt",
}


def parser(called: str) -> argparse.ArgumentParser:
    """Return the command line, with the options of the verb that is called."""
    top = argparse.ArgumentParser(
        prog="xca-imaging", description="IHE XDS-I.b / XCA-I imaging exchange node", allow_abbrev=False
    )
    top.add_argument("--version", action="version", version=f"xca-imaging {__version__}")
    top.add_argument("--debug", action="store_true", help="log everything, patient identifiers too, to stderr")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, summary in _VERBS.items():
        sub = verbs.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        if name == called:
            module = importlib.import_module(f"xca_imaging.cli.{name.replace('-', '_')}")
            module.configure(sub)
            sub.set_defaults(run=module.run)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    called = next((word for word in words if not word.startswith("-")), "")
    args = parser(called).parse_args(words)
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.DEBUG if args.debug else logging.INFO,
        format="%(asctime)s %(levelname)-7s %(name)s: %(message)s",
    )
    # Peers' own libraries log datasets and addresses at levels that an operator did not ask for.
    for noisy in ("pynetdicom", "pydicom", "aiohttp.access", "alembic"):
        logging.getLogger(noisy).setLevel(logging.DEBUG if args.debug else logging.ERROR)
    try:
        code: int = args.run(args)
    except ConfigurationError as exc:
        print(f"xca-imaging: {exc}", file=sys.stderr)
        return 2
    except (RegistryError, SubmissionRefused) as exc:
        print(f"xca-imaging: refused: {exc}", file=sys.stderr)
        return 1
    except ConnectFailed as exc:
        print(f"xca-imaging: {exc} (is it running, and do host and port fit?)", file=sys.stderr)
        return 1
    except XcaImagingError as exc:
        print(f"xca-imaging: {exc}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return code


if __name__ == "__main__":
    sys.exit(main())
