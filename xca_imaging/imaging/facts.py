"""What PACSs tell by C-FIND before they are asked to send: the facts that a plan is better with.

C-FIND only helps: where it fails the plan does without. A question is asked once however many want its answer, and
only when its PACS has a slot for it.

References
----------
* DICOM PS3.4, C.4.1 (C-FIND), C.6.2.1 (study root keys)
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol, TypeVar

from xca_imaging.errors import XcaImagingError
from xca_imaging.imaging.ledger import Want
from xca_imaging.imaging.plan import StudyIndex, build, unclear_series
from xca_imaging.imaging.study import InstanceFacts, SeriesFacts

_log = logging.getLogger(__name__)

T = TypeVar("T")


class SeriesFinder(Protocol):
    """What is asked of a PACS by C-FIND before it is asked to send."""

    async def find_series(self, study_instance_uid: str) -> Sequence[SeriesFacts]: ...

    async def find_instances(self, study_instance_uid: str, series_instance_uid: str) -> Sequence[InstanceFacts]: ...


class Facts:
    """The questions that are on their way.

    Parameters
    ----------
    routes : mapping
        RepositoryUniqueId -> PACS name.
    slot : callable
        Gives a context for a PACS name: inside it one association may be used.

    Attributes
    ----------
    finders : dict
        By PACS name; None for a PACS that is not asked.
    """

    # Mutable state: finders, and `_shared`: questions that several wait for.

    def __init__(
        self,
        routes: Mapping[str, str],
        slot: Callable[[str], AbstractAsyncContextManager[None]],
    ) -> None:
        self.finders: dict[str, SeriesFinder | None] = {}
        self._routes, self._slot = routes, slot
        self._shared: dict[tuple[str, ...], asyncio.Task[Any]] = {}

    async def learn(self, wants: Sequence[Want], accept: Sequence[str]) -> dict[tuple[str, str], StudyIndex]:
        """Ask the PACSs what the studies have: by series, and where that is not enough by instance."""
        facts: dict[tuple[str, str], StudyIndex] = {}
        studies = tuple(dict.fromkeys((self._routes[w.repository_unique_id], w.study_instance_uid) for w in wants))
        for key, series in zip(
            studies, await asyncio.gather(*(self._find_series(*key) for key in studies)), strict=True
        ):
            if series is not None:
                facts[key] = StudyIndex(series)
        unclear = unclear_series(build(wants, accept=accept, routes=self._routes, facts=facts), facts)
        found = await asyncio.gather(*(self._find_instances(*key) for key in unclear))
        for (pacs, study, uid), instances in zip(unclear, found, strict=True):
            if instances is not None:
                known = facts[pacs, study]
                facts[pacs, study] = StudyIndex(known.series, {**known.instances, uid: instances})
        return facts

    async def instances_now(self, pacs: str, study: str, series: str) -> Mapping[str, str] | None:
        """Ask what a series has; the caller has the slot. None when the PACS cannot tell."""
        finder = self.finders[pacs]
        if finder is None:
            return None
        found = await self._ask(pacs, finder.find_instances(study, series))
        return None if found is None else {each.sop_instance_uid: each.sop_class_uid for each in found}

    async def close(self) -> None:
        """Give up what is being asked."""
        tasks = tuple(self._shared.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _find_series(self, pacs: str, study: str) -> Mapping[str, int | None] | None:
        finder = self.finders[pacs]
        if finder is None:
            return None

        async def ask() -> Mapping[str, int | None] | None:
            async with self._slot(pacs):
                found = await self._ask(pacs, finder.find_series(study))
            return None if found is None else {each.series_instance_uid: each.number_of_instances for each in found}

        return await self._share((pacs, study), ask)

    async def _find_instances(self, pacs: str, study: str, series: str) -> Mapping[str, str] | None:
        async def ask() -> Mapping[str, str] | None:
            async with self._slot(pacs):
                return await self.instances_now(pacs, study, series)

        return await self._share((pacs, study, series), ask)

    async def _share(self, key: tuple[str, ...], ask: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Ask once, however many ask the same at the same time; one who goes away leaves it to the others."""
        task = self._shared.get(key)
        if task is None:
            task = self._shared[key] = asyncio.get_running_loop().create_task(ask())
            task.add_done_callback(lambda _: self._shared.pop(key, None))
        shared: T = await asyncio.shield(task)
        return shared

    async def _ask(self, pacs: str, asked: Coroutine[Any, Any, T]) -> T | None:
        try:
            return await asked
        except XcaImagingError as error:
            _log.info("going on without C-FIND: %s", error)
        except Exception:
            # A defect in what only helps must not end a retrieval that works without.
            _log.exception("C-FIND at %s failed", pacs)
        return None
