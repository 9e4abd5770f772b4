"""Run the cases, print the table, write the results; the exit code is 1 when a case failed.

A case that this version does not cover stands in `not-in-this-version.toml` with its reason. It is sent all the same
where there is something to send: once it passes, its line in that file is out of date and the run fails until the line
is gone. Nothing is left out silently.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib
import sys
import tempfile
import time
import tomllib
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from conformance import report
from conformance.environment import DATA, Environment, start
from conformance.steps import Steps
from tests.support import peers

FAMILIES = (
    "imaging_document_source",
    "responding_imaging_gateway",
    "initiating_imaging_gateway",
    "imaging_document_consumer",
    "document_repository",
    "document_registry_register",
    "document_registry_query",
    "responding_gateway",
    "initiating_gateway",
)
# left out by --short: the larger study, and sections that differ from others in one query parameter only
LONG = ("ids_2018-4801a (ids_pet)", "11897/*_*", "11898/*", "11998a/*_*")

Case = tuple[str, str, Callable[[], None] | None]


def _cases(environment: Environment) -> Iterator[Case]:
    """Yield (family, case, what runs it) in the order in which later cases rest on earlier ones."""
    steps = Steps(environment)
    for name in FAMILIES:
        module = importlib.import_module(f"conformance.{name}.cases")
        for case, run in getattr(module, "CASES", {}).items():
            yield module.FAMILY, case, None if run is None else lambda run=run: run(environment)
        for test in getattr(module, "TESTS", ()):
            for section in steps.sections(test):
                yield module.FAMILY, f"{test}/{section}", lambda t=test, s=section: steps.run(t, s)


def _declared() -> dict[str, str]:
    """Return the reasons of what this version does not cover, by pattern."""
    document = tomllib.loads((Path(__file__).parent / "not-in-this-version.toml").read_text())
    return {pattern: each["reason"] for each in document["absent"] for pattern in each["cases"]}


def _run_case(family: str, case: str, run: Callable[[], None] | None, declared: dict[str, str]) -> report.Result:
    reason = next((why for pattern, why in declared.items() if fnmatch.fnmatchcase(case, pattern)), "")
    started = time.monotonic()
    problem = ""
    if run is None:
        if not reason:
            return report.Result(family, case, "failed", "nothing runs it and no reason is declared")
        return report.Result(family, case, "not in this version", reason)
    try:
        run()
    except AssertionError as exc:
        problem = str(exc) or traceback.format_exc(limit=-1)
    except Exception:
        problem = traceback.format_exc(limit=-3)
    took = time.monotonic() - started
    if problem and reason:
        return report.Result(family, case, "not in this version", reason, took)
    if problem:
        return report.Result(family, case, "failed", problem.strip(), took)
    if reason:
        return report.Result(family, case, "failed", "passes: take it out of not-in-this-version.toml", took)
    return report.Result(family, case, "passed", "", took)


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m conformance", description=__doc__)
    parser.add_argument("--short", action="store_true", help="leave out what differs from another case in one value")
    parser.add_argument(
        "--only", metavar="PATTERN", default="*", help="run the cases that match (later ones may need earlier ones)"
    )
    parser.add_argument("--results", metavar="DIR", type=Path, default=Path("conformance-results"))
    arguments = parser.parse_args()
    if not DATA.is_dir():
        sys.stderr.write(f"the published cases are not there: {DATA}\n")
        return 2
    if not peers.installed("Orthanc"):
        sys.stderr.write("orthanc, the PACS of the cases, is not installed: make peers\n")
        return 2
    warnings.simplefilter("ignore")  # of pydicom, about the published images
    declared = _declared()
    results = []
    with (
        tempfile.TemporaryDirectory(prefix="conformance-") as folder,
        start(Path(folder), short=arguments.short) as scene,
    ):
        for family, case, run in _cases(scene):
            if not fnmatch.fnmatchcase(case, arguments.only):
                continue
            if arguments.short and any(fnmatch.fnmatchcase(case, pattern) for pattern in LONG):
                continue
            results.append(_run_case(family, case, run, declared))
        failed = any(each.outcome == "failed" for each in results)
        if failed:
            arguments.results.mkdir(parents=True, exist_ok=True)
            (arguments.results / "node.log").write_text(scene.node.tail(1_000_000))
    report.write_table(results, sys.stdout)
    report.write_files(results, arguments.results)
    return 1 if failed or not results else 0


if __name__ == "__main__":
    sys.exit(main())
