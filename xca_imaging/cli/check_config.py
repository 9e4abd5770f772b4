"""Say what is wrong with a configuration, with file, key and a hint."""

from __future__ import annotations

import argparse
import sys

from xca_imaging import settings as settings_module
from xca_imaging.cli.options import add_config
from xca_imaging.errors import ConfigurationError
from xca_imaging.imaging.profile import load_profile
from xca_imaging.registry.remote import RemoteStore
from xca_imaging.security import tls


def configure(sub: argparse.ArgumentParser) -> None:
    add_config(sub)


def run(args: argparse.Namespace) -> int:
    settings, problems = settings_module.problems(args.config)
    if settings is not None:
        for check in (
            lambda: load_profile(settings),
            lambda: RemoteStore.open(settings.repository.store),
            lambda: tls.server_context(settings, settings.http.tls, "http.tls"),
            lambda: tls.server_context(settings, settings.dicom.tls, "dicom.tls"),
        ):
            try:
                check()
            except ConfigurationError as exc:
                if not any(known.key == exc.key for known in problems):
                    problems.append(exc)
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        return 2
    print(f"{args.config}: no problems found")
    return 0
