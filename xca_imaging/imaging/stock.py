"""What the spool has for a request: instances as they were sent, and copies that were transcoded here.

References
----------
* IHE RAD TF-2, 3.69.4.2 (an instance that is stored in a listed transfer syntax is sent as it is)
"""

from __future__ import annotations

from collections.abc import Sequence

from xca_imaging.imaging.ledger import Want
from xca_imaging.imaging.spool import Spool, SpooledInstance
from xca_imaging.imaging.transcoders import Transcoders


class Stock:
    """Finds spooled instances for requests, and notes what they are good for."""

    def __init__(self, spool: Spool) -> None:
        self._spool = spool
        self.transcoders = Transcoders(spool)

    def find(self, want: Want, pacs: str, accept: Sequence[str]) -> SpooledInstance | None:
        """Return an instance that a request for these transfer syntaxes may get; nothing is acquired.

        A PACS may have decoded it because a shorter list left it no choice; with this list it would send it as it is
        stored. Only a list that names nothing more can have nothing better. What was transcoded here comes last.
        """
        place = (pacs, want.study_instance_uid, want.series_instance_uid)
        changed = None
        for syntax in accept:
            instance = self._spool.find(want.sop_instance_uid, (syntax,))
            if (
                instance is not None
                and place == (instance.source, instance.study_instance_uid, instance.series_instance_uid)
                and instance.accept.issuperset(accept)
            ):
                if not instance.bytes_changed:
                    return instance
                changed = changed or instance
        return changed

    def enter(self, instance: SpooledInstance, want: Want, pacs: str, asked: Sequence[str]) -> None:
        """Note where an instance belongs that a PACS has sent, and what the PACS could choose from.

        Several requests with different lists may end with it; it could choose from what all of them name.
        """
        asked_of_it = instance.accept.union(asked)
        instance.place(want.study_instance_uid, want.series_instance_uid, asked_of_it, source=pacs)

    async def transcode(self, instance: SpooledInstance, target_syntax: str) -> SpooledInstance:
        """Return a copy in another transfer syntax, held for the caller.

        It serves only requests that cannot have the instance as it was sent.

        Raises
        ------
        RegistryError
        """
        copy = await self.transcoders.transcode(instance, target_syntax)
        copy.place(
            instance.study_instance_uid,
            instance.series_instance_uid,
            instance.accept - {instance.transfer_syntax_uid},
            source=instance.source,
            bytes_changed=True,
        )
        return copy
