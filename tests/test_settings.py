from __future__ import annotations

from pathlib import Path

import pytest

from xca_imaging import settings
from xca_imaging.errors import ConfigurationError

NODE = '[node]\nhome_community_id = "urn:oid:1.2.3"\n'
PACS = """[[pacs]]
name = "main"
ae_title = "ORTHANC"
host = "127.0.0.1"
port = 4242
retrieve_location_uid = "1.2.3.4"
"""


def written(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "node.toml"
    file.write_text(text, encoding="utf-8")
    return file


def test_defaults_are_those_of_the_contract(tmp_path: Path) -> None:
    loaded = settings.load(written(tmp_path, NODE + PACS))
    assert (loaded.http.host, loaded.http.port, loaded.dicom.ae_title, loaded.dicom.port) == (
        "127.0.0.1",
        8080,
        "XCAI",
        11112,
    )
    assert loaded.spool.max_bytes == 20 * 10**9
    assert loaded.spool.retention == 900
    assert loaded.limits.root_part == 32 * 10**6
    assert loaded.pacs[0].max_associations == 4
    assert loaded.data_dir == tmp_path / "var"
    assert loaded.database_url == f"sqlite:///{tmp_path / 'var' / 'registry.db'}"


def test_routes(tmp_path: Path) -> None:
    community = '[[community]]\nhome_community_id = "urn:oid:1.2.9"\nname = "East"\n'
    loaded = settings.load(written(tmp_path, NODE + PACS + community))
    assert loaded.pacs_of_repository("1.2.3.4") is loaded.pacs[0]
    assert loaded.pacs_of_repository("1.2.3.5") is None
    assert loaded.community_of("urn:oid:1.2.9") is loaded.community[0]


@pytest.mark.parametrize(
    ("text", "key", "hint"),
    [
        ("", "node", "add it"),
        ("[node]\n", "node.home_community_id", "add it"),
        ('[node]\nhome_community_id = "1.2.3"\n', "node.home_community_id", "urn:oid:"),
        (NODE + "[http]\nprot = 1\n", "http.prot", "did you mean 'port'"),
        (NODE + '[http]\nport = "80"\n', "http.port", "integer"),
        (NODE + '[http]\nhost = "0.0.0.0"\n', "http.host", "insecure"),
        (NODE + '[dicom]\nhost = "::"\n', "dicom.host", "insecure"),
        (NODE + '[dicom]\nae_title = "FAR TOO LONG A TITLE"\n', "dicom.ae_title", "16 characters"),
        (NODE + '[spool]\nmax_bytes = "3 lumps"\n', "spool.max_bytes", "20GB"),
        (NODE + "[publish]\nwatch = true\n", "publish.watch", "repository.unique_id"),
        (NODE + '[publish]\ninterval = "200ms"\n', "publish.interval", "60s"),
        (NODE + "[publish]\ndays = -1\n", "publish.days", "0"),
        (NODE + '[limits]\nstall_timeout = "soon"\n', "limits.stall_timeout", "30s"),
        (NODE + PACS.replace("4242", "99999"), "pacs[0].port", "65535"),
        (NODE + PACS.replace("4242", "0"), "pacs[0].port", "1"),
        (NODE + PACS + PACS, "pacs[].name", "unique"),
        (NODE + '[xua]\nmode = "required"\n', "xua.mode", "leave the key out"),
        (NODE + PACS + 'retrieve = "wado-rs"\n', "pacs[0].wado_rs", "base URL"),
        (NODE + PACS + 'retrieve = "c-find"\n', "pacs[0].retrieve", "c-get"),
        (NODE + PACS + 'fallback = ["c-move"]\n', "pacs[0].fallback", "leave out"),
        (NODE + PACS + 'fallback = ["wado-rs"]\n', "pacs[0].wado_rs", "base URL"),
        (NODE + PACS + 'hours = ["8-18"]\n', "pacs[0].hours[0]", "20:00-06:00"),
        (NODE + PACS + 'hours = ["08:00-08:00"]\n', "pacs[0].hours[0]", "different"),
        (NODE + PACS + 'level = "patient"\n', "pacs[0].level", "study"),
        (NODE + PACS + "uid_list_limit = 1008\n", "pacs[0].uid_list_limit", "1000"),
        (NODE + PACS + 'bytes_per_second = "fast"\n', "pacs[0].bytes_per_second", "20GB"),
        (NODE + "[[policy.rule]]\nname = 'a'\neffect = 'permit'\n", "policy.rule", "leave the key out"),
        (NODE + "[http.tls]\ncertificate = 'a'\nprivate_key = 'b'\n", "http.tls.client_ca", "add it"),
        (NODE + '[[community]]\nhome_community_id = "urn:oid:1.2.3"\n', "community[].home_community_id", "remove"),
        ("nonsense", "", "TOML"),
    ],
)
def test_what_is_wrong_names_file_key_and_remedy(tmp_path: Path, text: str, key: str, hint: str) -> None:
    file = written(tmp_path, text)
    with pytest.raises(ConfigurationError) as caught:
        settings.load(file)
    assert caught.value.file == str(file)
    assert caught.value.key == key
    assert hint in str(caught.value)


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    _, found = settings.problems(written(tmp_path, NODE + "[http]\nprot = 1\n[dicom]\nporf = 1\n"))
    assert {each.key for each in found} == {"http.prot", "dicom.porf"}


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot be read"):
        settings.load(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("text", "seconds"), [("500ms", 0.5), ("30s", 30.0), ("15m", 900.0), ("2h", 7200.0), ("1d", 86400.0)]
)
def test_durations(tmp_path: Path, text: str, seconds: float) -> None:
    loaded = settings.load(written(tmp_path, f'{NODE}[spool]\nretention = "{text}"\n'))
    assert loaded.spool.retention == seconds


@pytest.mark.parametrize(
    ("host", "expected"), [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("pacs", False)]
)
def test_loopback(host: str, expected: bool) -> None:
    assert settings.is_loopback(host) is expected
