"""Settings of a node: one TOML file, read once into frozen values.

Every key of the published configuration is known here, with its type and default. A key that is not known, or a value
of the wrong kind, is a `ConfigurationError` that names file, key and remedy. A value that asks for something which
this version cannot do is refused too: a node that ignores `xua.mode = "required"` would be worse than one that does
not start.
"""

from __future__ import annotations

import difflib
import ipaddress
import re
import tomllib
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from xca_imaging.errors import ConfigurationError

_DURATION_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_SIZE_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_OID = re.compile(r"[0-2](\.(0|[1-9][0-9]*))+")
_HOURS = re.compile(r"((?:[01][0-9]|2[0-3]):[0-5][0-9])-((?:[01][0-9]|2[0-3]):[0-5][0-9]|24:00)")
_AE_TITLE = re.compile(r"[ -\[\]-~]{1,16}")  # PS3.5 6.2, VR AE: default repertoire without backslash and controls


def _duration(value: object) -> object:
    if isinstance(value, str):
        match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(ms|s|m|h|d)\s*", value)
        if not match:
            raise ValueError('write a duration as a number and a unit, for example "500ms", "30s", "15m", "2h"')
        return float(match[1]) * _DURATION_UNITS[match[2]]
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
        raise ValueError('write a duration as a number and a unit, for example "30s"')
    return float(value)


def _size(value: object) -> object:
    if isinstance(value, str):
        match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?i?B)\s*", value, re.IGNORECASE)
        if not match or match[2].upper() not in _SIZE_UNITS:
            raise ValueError('write a size as a number and a unit, for example "32MB", "20GB"')
        return int(float(match[1]) * _SIZE_UNITS[match[2].upper()])
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError('write a size as a number and a unit, for example "20GB"')
    return value


def _oid(value: str) -> str:
    if value and (not _OID.fullmatch(value) or len(value) > 64):
        raise ValueError("must be an OID: digits and dots, at most 64 characters, no urn:oid: prefix")
    return value


def _home_community_id(value: str) -> str:
    if not value.startswith("urn:oid:") or not _OID.fullmatch(value.removeprefix("urn:oid:")) or len(value) > 64:
        raise ValueError('must be "urn:oid:" followed by an OID, at most 64 characters')
    return value


def _ae_title(value: str) -> str:
    if not _AE_TITLE.fullmatch(value) or value != value.strip():
        raise ValueError("an AE title has 1 to 16 characters of ASCII without backslash")
    return value


def _url(value: str) -> str:
    if value and not re.match(r"https?://[^/\s]+", value):
        raise ValueError("must be an http:// or https:// URL")
    return value


def _hours(value: str) -> str:
    match = _HOURS.fullmatch(value)
    if not match or match[1] == match[2]:
        raise ValueError('write times of day as "20:00-06:00", from 00:00 to 24:00, start and end different')
    return value


Duration = Annotated[float, BeforeValidator(_duration)]
"""Seconds."""
Size = Annotated[int, BeforeValidator(_size)]
"""Bytes."""
Oid = Annotated[str, AfterValidator(_oid)]
HomeCommunityId = Annotated[str, AfterValidator(_home_community_id)]
AeTitle = Annotated[str, AfterValidator(_ae_title)]
Url = Annotated[str, AfterValidator(_url)]
Hours = Annotated[str, AfterValidator(_hours)]
"""Local times of day, start and end; the end may be that of the next day."""
Port = Annotated[int, Field(ge=0, le=65535)]
RemotePort = Annotated[int, Field(ge=1, le=65535)]


class Section(BaseModel):
    """One table of the configuration file: frozen, no unknown keys, no silent conversion."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Tls(Section):
    """Three PEM files; all present = mutual TLS."""

    certificate: str
    private_key: str
    client_ca: str


class Node(Section):
    """`[node]`"""

    home_community_id: HomeCommunityId
    name: str = "xca-imaging"
    data_dir: str = "var"
    profile: str = "ihe"
    drain_timeout: Duration = 30.0


class Http(Section):
    """`[http]`"""

    host: str = "127.0.0.1"
    port: Port = 8080
    insecure: bool = False
    delivery: Literal["spooled", "streaming"] = "spooled"
    tls: Tls | None = None


class Dicom(Section):
    """`[dicom]`: our Storage SCP and our calling AE title."""

    ae_title: AeTitle = "XCAI"
    host: str = "127.0.0.1"
    port: Port = 11112
    insecure: bool = False
    receivers: Annotated[int, Field(ge=1, le=64)] = 1
    calling_ae_titles: tuple[AeTitle, ...] = ()
    tls: Tls | None = None


class Database(Section):
    """`[database]`"""

    url: str = "sqlite:///registry.db"


class RepositorySettings(Section):
    """`[repository]`"""

    unique_id: Oid = ""
    persist_on_demand: bool = False
    store: str = ""


class RegistrySettings(Section):
    """`[registry]`"""

    assigning_authorities: tuple[Oid, ...] = ()
    strict_patients: bool = False
    max_results: Annotated[int, Field(ge=0)] = 5000


class SpoolSettings(Section):
    """`[spool]`"""

    max_bytes: Size = 20 * 10**9
    retention: Duration = 900.0


class Pacs(Section):
    """`[[pacs]]`: one imaging back end."""

    name: str
    ae_title: AeTitle
    host: str
    port: RemotePort
    retrieve_location_uid: Oid
    retrieve: Literal["c-move", "c-get", "wado-rs"] = "c-move"
    fallback: tuple[Literal["c-move", "c-get", "wado-rs"], ...] = ()
    max_associations: Annotated[int, Field(ge=1, le=64)] = 4
    wado_rs: Url = ""
    assigning_authority: Oid = ""
    transcode: bool = False
    bytes_per_second: Size = 0
    hours: tuple[Hours, ...] = ()
    level: Literal["auto", "study", "series", "image"] = "auto"
    uid_list_limit: Annotated[int, Field(ge=1, le=1000)] = 128


class Publish(Section):
    """`[publish]`"""

    repository: Url = ""
    watch: bool = False
    interval: Duration = 60.0
    days: Annotated[int, Field(ge=0)] = 7
    reports: bool = False


class ImagingSource(Section):
    """`[[imaging_source]]`: another vendor's Imaging Document Source behind our responding imaging gateway."""

    name: str
    repository_unique_id: Oid
    url: Url


class Community(Section):
    """`[[community]]`: another community and its gateways."""

    home_community_id: HomeCommunityId
    name: str = ""
    query: Url = ""
    retrieve: Url = ""
    imaging: Url = ""
    patient_discovery: Url = ""
    repositories: tuple[Oid, ...] = ()
    timeout: Duration = 30.0
    certificate: str = ""
    weight: Annotated[float, Field(gt=0)] = 1.0
    delivery: Literal["spooled", "streaming"] = "spooled"

    @property
    def label(self) -> str:
        return self.name or self.home_community_id


class XuaIssue(Section):
    """`[xua.issue]`"""

    certificate: str = ""
    private_key: str = ""
    issuer: str = ""
    subject: str = ""
    name: str = ""
    organization: str = ""
    organization_id: str = ""
    role: str = ""
    purpose: str = "TREATMENT"


class Xua(Section):
    """`[xua]`"""

    mode: Literal["off", "optional", "required"] = "off"
    trusted: tuple[str, ...] = ()
    audience: str = ""
    clock_skew: Duration = 60.0
    issue: XuaIssue = XuaIssue()


class PolicyRule(Section):
    """`[[policy.rule]]`"""

    name: str
    effect: Literal["permit", "deny"]
    community: tuple[HomeCommunityId, ...] = ()
    purpose: tuple[str, ...] = ()
    role: tuple[str, ...] = ()
    confidentiality: tuple[str, ...] = ()
    emergency: bool = False


class PolicyConsent(Section):
    """`[[policy.consent]]`"""

    patient: str
    effect: Literal["permit", "deny"]
    community: tuple[HomeCommunityId, ...] = ()
    purpose: tuple[str, ...] = ()
    from_: Annotated[date | None, Field(alias="from")] = None
    until: date | None = None


class Policy(Section):
    """`[policy]`"""

    rule: tuple[PolicyRule, ...] = ()
    consent: tuple[PolicyConsent, ...] = ()


class Audit(Section):
    """`[audit]`"""

    store: bool = True
    syslog: str = ""
    tls: Tls | None = None


class Hl7(Section):
    """`[hl7]`"""

    port: Port = 0


class Limits(Section):
    """`[limits]`"""

    root_part: Size = 32 * 10**6
    header_timeout: Duration = 10.0
    stall_timeout: Duration = 60.0
    artim_timeout: Duration = 30.0
    http_connections: Annotated[int, Field(ge=1)] = 2000
    associations: Annotated[int, Field(ge=1)] = 256


class Settings(Section):
    """The whole configuration; `file` is where it came from and what relative paths are relative to."""

    file: Path
    node: Node
    http: Http = Http()
    dicom: Dicom = Dicom()
    database: Database = Database()
    repository: RepositorySettings = RepositorySettings()
    registry: RegistrySettings = RegistrySettings()
    spool: SpoolSettings = SpoolSettings()
    pacs: tuple[Pacs, ...] = ()
    publish: Publish = Publish()
    imaging_source: tuple[ImagingSource, ...] = ()
    community: tuple[Community, ...] = ()
    xua: Xua = Xua()
    policy: Policy = Policy()
    audit: Audit = Audit()
    hl7: Hl7 = Hl7()
    limits: Limits = Limits()

    def path(self, name: str) -> Path:
        """Return a path of the configuration, relative ones from the folder of the file."""
        return self.file.parent / name

    @property
    def data_dir(self) -> Path:
        return self.path(self.node.data_dir)

    @property
    def database_url(self) -> str:
        """The database URL with a relative SQLite path made absolute: it lives in `node.data_dir`."""
        prefix = "sqlite:///"
        url = self.database.url
        if url.startswith(prefix) and not url.startswith(prefix + "/") and url != prefix + ":memory:":
            return f"{prefix}{self.data_dir.resolve() / url.removeprefix(prefix)}"
        return url

    def pacs_of_repository(self, repository_unique_id: str) -> Pacs | None:
        """Return the PACS that RAD-69 requests with this RepositoryUniqueId mean."""
        for pacs in self.pacs:
            if pacs.retrieve_location_uid == repository_unique_id:
                return pacs
        return None

    def community_of(self, home_community_id: str) -> Community | None:
        """Return the configured community with this home community id."""
        for community in self.community:
            if community.home_community_id == home_community_id:
                return community
        return None


def is_loopback(host: str) -> bool:
    """Tell whether a listener on `host` can be reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def load(file: Path) -> Settings:
    """Read and check a configuration file.

    Raises
    ------
    ConfigurationError
        The first problem found; `problems` returns all of them.
    """
    settings, found = problems(file)
    if settings is None or found:
        raise found[0]
    return settings


def problems(file: Path) -> tuple[Settings | None, list[ConfigurationError]]:
    """Read a configuration file and return it with everything that is wrong with it."""
    name = str(file)
    try:
        with file.open("rb") as stream:
            data = tomllib.load(stream)
    except OSError as exc:
        return None, [ConfigurationError(name, "", f"cannot be read: {exc.strerror}", "check path and permissions")]
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        return None, [ConfigurationError(name, "", f"is not TOML: {exc}", "see the example in docs/configuration.md")]
    if "file" in data:
        return None, [ConfigurationError(name, "file", "unknown key", "remove it")]
    try:
        settings = Settings.model_validate({**_tuples(data), "file": file})
    except ValidationError as exc:
        return None, [_explain(name, error) for error in exc.errors()]
    return settings, list(_cross_checks(settings))


def _tuples(value: Any) -> Any:
    """TOML arrays as tuples: the models are frozen and strict."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    if isinstance(value, list):
        return tuple(_tuples(item) for item in value)
    return value


def _explain(file: str, error: Any) -> ConfigurationError:
    location = list(error["loc"])
    key = ""
    for step in location:
        key += f"[{step}]" if isinstance(step, int) else f".{step}" if key else str(step)
    match error["type"]:
        case "extra_forbidden":
            known = _keys_at(location[:-1])
            close = difflib.get_close_matches(str(location[-1]), known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "known here: " + ", ".join(sorted(known))
            return ConfigurationError(file, key, "unknown key", hint)
        case "missing":
            return ConfigurationError(file, key, "is required and missing", "add it")
        case "value_error":
            return ConfigurationError(file, key, f"{error['input']!r} is not valid", str(error["ctx"]["error"]))
        case _:
            return ConfigurationError(file, key, f"{error['input']!r} is not valid", error["msg"])


def _keys_at(location: list[Any]) -> list[str]:
    model: Any = Settings
    for step in location:
        if isinstance(step, int):
            continue
        annotation = model.model_fields[step].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        model = next(c for c in candidates if isinstance(c, type) and issubclass(c, Section))
    return [field.alias or name for name, field in model.model_fields.items() if name != "file"]


def _cross_checks(settings: Settings) -> list[ConfigurationError]:
    found: list[ConfigurationError] = []

    def wrong(key: str, problem: str, hint: str) -> None:
        found.append(ConfigurationError(str(settings.file), key, problem, hint))

    for section, listener in (("http", settings.http), ("dicom", settings.dicom)):
        if listener.tls is None and not listener.insecure and not is_loopback(listener.host):
            wrong(
                f"{section}.host",
                f"{listener.host!r} is not loopback and there is no [{section}.tls]",
                f"add [{section}.tls], or set {section}.insecure = true to serve without encryption",
            )
    for section, tls in (("http.tls", settings.http.tls), ("dicom.tls", settings.dicom.tls)):
        if tls is not None:
            for field in ("certificate", "private_key", "client_ca"):
                if not settings.path(getattr(tls, field)).is_file():
                    wrong(f"{section}.{field}", f"file {getattr(tls, field)!r} not found", "paths start at this file")
    for key, values in (
        ("pacs[].name", [p.name for p in settings.pacs]),
        ("pacs[].retrieve_location_uid", [p.retrieve_location_uid for p in settings.pacs]),
        ("community[].home_community_id", [c.home_community_id for c in settings.community]),
    ):
        for value in sorted({v for v in values if values.count(v) > 1}):
            wrong(key, f"{value!r} stands there twice", "each must be unique: requests are routed by it")
    for index, community in enumerate(settings.community):
        if community.certificate and settings.http.tls is None:
            wrong(f"community[{index}].certificate", "is never shown without [http.tls]", "add [http.tls]")
    if settings.community_of(settings.node.home_community_id):
        wrong("community[].home_community_id", "is this node's own", "remove that community")
    for index, pacs in enumerate(settings.pacs):
        if not pacs.retrieve_location_uid:
            wrong(f"pacs[{index}].retrieve_location_uid", "is required and empty", "give the OID that RAD-69 carries")
        methods = (pacs.retrieve, *pacs.fallback)
        if len(set(methods)) < len(methods):
            wrong(f"pacs[{index}].fallback", f"{methods} names one twice", "leave out what retrieve names already")
        if "wado-rs" in methods and not pacs.wado_rs:
            problem = f"is empty and {'retrieve' if methods[0] == 'wado-rs' else 'fallback'} names wado-rs"
            wrong(f"pacs[{index}].wado_rs", problem, 'give the base URL of its WADO-RS, "https://.../dicom-web"')
    publish = settings.publish
    if publish.watch and not (settings.repository.unique_id or publish.repository):
        wrong("publish.watch", "there is no repository to publish to", "set repository.unique_id or publish.repository")
    if publish.interval < 1:
        wrong("publish.interval", "is less than a second", "a PACS has other things to do: write for example 60s")
    found.extend(_not_yet(settings))
    return found


def _not_yet(settings: Settings) -> list[ConfigurationError]:
    """Return an error for each value that asks for what this version does not do."""
    asked = {
        "imaging_source": bool(settings.imaging_source),
        "xua.mode": settings.xua.mode != "off",
        "xua.issue": settings.xua.issue != XuaIssue(),
        "policy.rule": bool(settings.policy.rule),
        "policy.consent": bool(settings.policy.consent),
        "audit.syslog": bool(settings.audit.syslog),
    }
    for index, community in enumerate(settings.community):
        asked[f"community[{index}].patient_discovery"] = bool(community.patient_discovery)
    return [
        ConfigurationError(str(settings.file), key, "is not available in this version", "leave the key out")
        for key, is_asked in asked.items()
        if is_asked
    ]
