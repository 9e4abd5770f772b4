"""The `xca-imaging` command.

Exit codes: 0 all was right; 1 it was tried and failed, or not everything arrived; 2 usage or configuration is wrong.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from xca_imaging import __version__
from xca_imaging.cli import check_config, demo, echo, publish, query, retrieve, serve
from xca_imaging.errors import ConfigurationError, ConnectFailed, RegistryError, SubmissionRefused, XcaImagingError

_VERBS = (serve, demo, check_config, echo, publish, query, retrieve)


def parser() -> argparse.ArgumentParser:
    """Return the command line of every verb."""
    top = argparse.ArgumentParser(
        prog="xca-imaging", description="IHE XDS-I.b / XCA-I imaging exchange node", allow_abbrev=False
    )
    top.add_argument("--version", action="version", version=f"xca-imaging {__version__}")
    top.add_argument("--debug", action="store_true", help="log everything, patient identifiers too, to stderr")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    for module in _VERBS:
        name = module.__name__.rpartition(".")[2].replace("_", "-")
        summary = (module.__doc__ or "").strip().splitlines()[0].rstrip(".")
        sub = verbs.add_parser(name, help=summary, description=module.__doc__, allow_abbrev=False)
        module.configure(sub)
        sub.set_defaults(run=module.run)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code."""
    args = parser().parse_args(arguments)
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
