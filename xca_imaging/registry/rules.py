"""What a submission must hold against what is registered: the checks of a registry that need its state.

Pure functions over the submission and the few rows that it touches. What can be seen in the message alone
(`metadata.validate`) has been checked before and is relied on: one SubmissionSet, one patient, relationships that start
at a document of the submission, memberships. All checks run, so that one answer names all that is wrong.

References
----------
* IHE ITI TF-2, 3.42.4.1.3 (expected actions of a Document Registry)
* IHE ITI TF-3, 4.2.2 (associations)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from xca_imaging import errors, uids
from xca_imaging.errors import RegistryError
from xca_imaging.metadata.model import Association, DocumentEntry, Folder, RegistryObject, Submission, SubmissionSet
from xca_imaging.metadata.vocabulary import ANY, Vocabulary
from xca_imaging.registry.tables import Kind, Status

REPLACING = frozenset({uids.RPLC, uids.XFRM_RPLC})
"""Relationships that deprecate their target."""

# The target must be in the registry already, not in the same submission (TF-2 3.42.4.1.3.5).
_TARGET_REGISTERED = REPLACING | {uids.IS_SNAPSHOT_OF}


@dataclass(frozen=True, slots=True)
class Policy:
    """What an affinity domain decides for its registry."""

    home_community_id: str
    assigning_authorities: frozenset[str] = frozenset()
    """Accepted patient identifier domains (OIDs); empty accepts any."""
    strict_patients: bool = False
    """Only patients known by feed may be registered."""
    vocabulary: Vocabulary = ANY
    """Codes and media types that are allowed."""


@dataclass(frozen=True, slots=True)
class Known:
    """A registered object that a submission names, by entryUUID or by uniqueId."""

    id: int
    kind: str
    entry_uuid: str
    unique_id: str
    patient_id: str
    status: str
    on_demand: bool = False
    hash: str = ""
    size: int | None = None


@dataclass(frozen=True, slots=True)
class State:
    """What the registry holds about a submission before it is applied."""

    by_uuid: Mapping[str, Known]
    by_unique_id: Mapping[str, Sequence[Known]]
    patient_known: bool
    """Whether the submission's patient is known by feed."""
    merged_into: str = ""
    """The surviving id, when the submission's patient id has been given up for another."""


def check(submission: Submission, state: State, policy: Policy) -> Iterator[RegistryError]:
    """Yield what forbids a submission to be applied; objects are named by the ids that the submitter gave them."""
    yield from _check_ids(submission, state)
    yield from _check_patients(submission, state, policy)
    yield from _check_unique_ids(submission, state)
    new = {item.entry_uuid: item for item in submission}
    for association in submission.associations:
        yield from _check_association(association, new, state.by_uuid)


def assigning_authority(patient_id: str) -> str:
    """Return the OID of a CX's assigning authority: `id^^^&OID&ISO` (TF-3 4.2.3.1.7); empty if there is none."""
    components = patient_id.split("^")
    authority = components[3].split("&") if len(components) > 3 else []
    return authority[1] if len(authority) > 1 else ""


def describe(item: RegistryObject) -> str:
    """Return the words by which an error names an object of the submission."""
    return f"{type(item).__name__} {item.entry_uuid}"


def _check_ids(submission: Submission, state: State) -> Iterator[RegistryError]:
    for item in submission:
        if item.entry_uuid in state.by_uuid:
            # An update of metadata is another transaction (ITI-57).
            yield errors.RegistryMetadataError(f"the id of {describe(item)} belongs to an object in the registry")


def _check_patients(submission: Submission, state: State, policy: Policy) -> Iterator[RegistryError]:
    patient_id = submission.submission_sets[0].patient_id  # that of all objects: checked with the message
    authority = assigning_authority(patient_id)
    if policy.assigning_authorities and authority not in policy.assigning_authorities:
        yield errors.UnknownPatientId(f"this registry takes no patient ids of the assigning authority {authority!r}")
    elif state.merged_into:
        yield errors.UnknownPatientId(f"patient id {patient_id} has been merged into {state.merged_into}")
    elif policy.strict_patients and not state.patient_known:
        yield errors.UnknownPatientId(f"patient id {patient_id} is not known to this registry")


def _check_unique_ids(submission: Submission, state: State) -> Iterator[RegistryError]:
    packages: list[SubmissionSet | Folder] = [*submission.submission_sets, *submission.folders]
    for package in packages:
        if state.by_unique_id.get(package.unique_id):
            yield errors.DuplicateUniqueIdInRegistry(f"uniqueId {package.unique_id} of {describe(package)} is in use")
    for document in submission.documents:
        for known in state.by_unique_id.get(document.unique_id, ()):
            if known.kind != Kind.DOCUMENT_ENTRY:
                yield errors.DuplicateUniqueIdInRegistry(
                    f"uniqueId {document.unique_id} of {describe(document)} is that of a {known.kind}"
                )
                break
            on_demand = document.object_type == uids.ON_DEMAND_DOCUMENT
            if on_demand or known.on_demand:
                # Several on-demand entries may share a uniqueId, never with a stable one (TF-2 3.61.4.1.3).
                if on_demand != known.on_demand:
                    other = "an on-demand" if known.on_demand else "a stable"
                    yield errors.DuplicateUniqueIdInRegistry(
                        f"uniqueId {document.unique_id} of {describe(document)} is that of {other} document"
                    )
                    break
                continue
            # Both are reported with the uniqueId as codeContext (TF-3 Table 4.2.4.1-2).
            same_hash = known.hash.lower() == document.hash.lower()
            if not same_hash:
                yield errors.NonIdenticalHash(document.unique_id)
            if known.size != document.size:
                yield errors.NonIdenticalSize(document.unique_id)
            if not same_hash or known.size != document.size:
                break


def _check_association(
    association: Association, new: Mapping[str, RegistryObject], known: Mapping[str, Known]
) -> Iterator[RegistryError]:
    if association.type == uids.HAS_MEMBER:
        source = new.get(association.source)
        if isinstance(source, SubmissionSet):
            yield from _check_submission_set_member(association, source, new, known)
        elif isinstance(source, Folder) or _is(known.get(association.source), Kind.FOLDER):
            yield from _check_folder_member(association, new, known)
        else:
            yield errors.UnresolvedReference(
                f"{describe(association)}: {association.source} is neither the SubmissionSet of this submission "
                "nor a Folder"
            )
    else:
        yield from _check_relationship(association, new, known)


def _check_submission_set_member(
    association: Association,
    submission_set: SubmissionSet,
    new: Mapping[str, RegistryObject],
    known: Mapping[str, Known],
) -> Iterator[RegistryError]:
    if association.target in new:
        return
    target = known.get(association.target)
    if target is None or target.kind == Kind.SUBMISSION_SET:
        yield _unresolved(association, "object")
    elif target.kind != Kind.DOCUMENT_ENTRY and target.patient_id != submission_set.patient_id:
        # A document by reference may be another patient's: mother and child (TF-2 3.18.4.1.2.3.7.4, note).
        yield _other_patient(association)


def _check_folder_member(
    association: Association, new: Mapping[str, RegistryObject], known: Mapping[str, Known]
) -> Iterator[RegistryError]:
    target = new.get(association.target) or known.get(association.target)
    if not (isinstance(target, DocumentEntry) or _is(target, Kind.DOCUMENT_ENTRY)):
        yield _unresolved(association, "DocumentEntry")
        return
    folder = new.get(association.source) or known[association.source]
    for end in (folder, target):
        if isinstance(end, Known) and end.status != Status.APPROVED:
            yield errors.DeprecatedDocumentError(
                f"{describe(association)}: the {end.kind} {end.entry_uuid} is deprecated"
            )
    if _patient(folder) != _patient(target):
        yield _other_patient(association)


def _check_relationship(
    association: Association, new: Mapping[str, RegistryObject], known: Mapping[str, Known]
) -> Iterator[RegistryError]:
    source = new[association.source]  # a DocumentEntry of the submission: checked with the message
    sibling = new.get(association.target)
    if isinstance(sibling, DocumentEntry) and association.type not in _TARGET_REGISTERED:
        return  # same patient as all of the submission
    target = known.get(association.target)
    if target is None or target.kind != Kind.DOCUMENT_ENTRY:
        yield _unresolved(association, "registered DocumentEntry")
        return
    if association.type == uids.IS_SNAPSHOT_OF and not target.on_demand:
        yield _unresolved(association, "on-demand DocumentEntry")
    if target.status != Status.APPROVED:
        yield errors.DeprecatedDocumentError(f"{describe(association)}: {target.entry_uuid} is deprecated")
    if target.patient_id != _patient(source):
        yield _other_patient(association)


def _is(item: object, kind: Kind) -> bool:
    return isinstance(item, Known) and item.kind == kind


def _patient(item: RegistryObject | Known | None) -> str:
    return getattr(item, "patient_id", "")


def _unresolved(association: Association, wanted: str) -> RegistryError:
    return errors.UnresolvedReference(f"{describe(association)}: there is no {wanted} {association.target}")


def _other_patient(association: Association) -> RegistryError:
    return errors.PatientIdDoesNotMatch(
        f"{describe(association)}: {association.source} and {association.target} have different patient ids"
    )
