"""Profiles of affinity domains."""

from __future__ import annotations

import sys
from datetime import UTC
from pathlib import Path
from types import SimpleNamespace

import pytest
from pydicom.sr import _concepts_dict

from xca_imaging import data_files, settings
from xca_imaging.data_files import data_folder
from xca_imaging.errors import ConfigurationError
from xca_imaging.imaging.profile import Profile, load_profile, read_profile
from xca_imaging.metadata.model import Code


def node(folder: Path, profile: str) -> settings.Settings:
    return settings.Settings(
        file=folder / "node.toml", node=settings.Node(home_community_id="urn:oid:1.2.3", profile=profile)
    )


@pytest.fixture(scope="module")
def ihe() -> Profile:
    return read_profile(data_folder("profiles") / "ihe.toml")


def written(folder: Path, text: str, name: str = "domain.toml") -> Path:
    file = folder / name
    file.write_text(text)
    return file


def test_the_default_profile(tmp_path: Path, ihe: Profile) -> None:
    assert load_profile(node(tmp_path, "ihe")) == ihe
    assert ihe.timezone is UTC
    assert ihe.codes.format == Code(
        "1.2.840.10008.5.1.4.1.1.88.59", "1.2.840.10008.2.6.1", "Key Object Selection Document"
    )
    assert ihe.codes.class_.code == "IMAGES"


def test_regions_are_what_they_say(ihe: Profile) -> None:
    """Each code is the SNOMED CT concept of that name in DICOM's own context groups."""
    concepts = {
        (code, meaning.lower())
        for values in _concepts_dict.concepts["SCT"].values()
        for code, (meaning, _) in values.items()
    }
    # CALF is in Annex L, and in no context group by that meaning
    unknown = {term for term, each in ihe.regions.items() if (each.code, each.display.lower()) not in concepts}
    assert unknown <= {"CALF"}
    assert {"CHEST", "ABDOMEN", "HEAD", "LUNG", "BRAIN", "KNEE"} <= ihe.regions.keys()


def test_modalities_are_acquired(ihe: Profile) -> None:
    assert {"CT", "MR", "US", "PT", "CR", "DX", "MG", "XA", "NM", "ECG", "SM"} <= ihe.modalities.keys()
    assert not {"KO", "PR", "SR", "SEG", "REG", "DOC", "RTSTRUCT", "RTPLAN"} & ihe.modalities.keys()


def test_a_domain_extends_another(tmp_path: Path, ihe: Profile) -> None:
    written(
        tmp_path,
        """
        extends = "ihe"
        timezone = "Europe/Berlin"
        accession_assigning_authority = "1.3.6.1.4.1.21367.13.202.2000"
        [codes]
        practice_setting = { code = "RAD", scheme = "1.2.3", display = "Radiologie" }
        [regions]
        "CHEST PA" = { code = "816094009", display = "Chest" }
        """,
    )
    domain = load_profile(node(tmp_path, "domain.toml"))
    assert str(domain.timezone) == "Europe/Berlin"
    assert domain.accession_assigning_authority == "1.3.6.1.4.1.21367.13.202.2000"
    assert domain.codes.practice_setting == Code("RAD", "1.2.3", "Radiologie")
    assert domain.codes.class_ == ihe.codes.class_
    assert len(domain.regions) == len(ihe.regions) + 1


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('extends = "ihe"\ntimezone = "Berlin"', "timezone"),
        ('extends = "ihe"\nlanguage = "no language"', "language"),
        ('extends = "ihe"\nclasscode = "x"', "classcode"),
        ('extends = "ihe"\n[codes]\nclass = "IMAGES"', "codes.class"),
        ('extends = "ihe"\n[codes]\nclass = { code = "IMAGES" }', "codes.class"),
        ('extends = "ihe"\n[codes]\nclass = { code = "", scheme = "1.2" }', "codes.class"),
        ('extends = "ihe"\n[codes]\nconfidentiality = []', "codes.confidentiality"),
        ('extends = "ihe"\n[coding_schemes]\nX = "not an OID"', "coding_schemes.X"),
        ('extends = "ihe"\n[regions]\nCHEST = "816094009"', "regions.CHEST"),
        ('language = "en"', "timezone"),
        ('extends = "domain.toml"', "extends"),
        ("extends = 3", "extends"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, key: str) -> None:
    file = written(tmp_path, text)
    with pytest.raises(ConfigurationError) as caught:
        load_profile(node(tmp_path, "domain.toml"))
    assert (caught.value.file, caught.value.key) == (str(file), key)


def test_not_toml(tmp_path: Path) -> None:
    written(tmp_path, "= ?")
    with pytest.raises(ConfigurationError, match="not TOML"):
        load_profile(node(tmp_path, "domain.toml"))


@pytest.mark.parametrize("name", ["ieh", "../profiles/ihe", ""])
def test_unknown_profile(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigurationError, match=r"known: .*ihe") as caught:
        load_profile(node(tmp_path, name))
    assert caught.value.key == "node.profile"


def test_unknown_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot be read"):
        load_profile(node(tmp_path, "nothing.toml"))


def test_data_of_an_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside a checkout the folders are below `sys.prefix`, or beside the package after `pip install --target`."""
    installed = tmp_path / "share" / "xca-imaging" / "profiles"
    installed.mkdir(parents=True)
    monkeypatch.setattr(data_files, "_PARENT", tmp_path / "site-packages")
    monkeypatch.setattr(data_files, "distribution", lambda name: SimpleNamespace(files=[]))
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert data_folder("profiles") == installed
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "elsewhere"))
    monkeypatch.setattr(data_files, "_PARENT", tmp_path)
    assert data_folder("profiles") == installed
    with pytest.raises(ConfigurationError, match="wsdl"):
        data_folder("wsdl")


def test_a_domain_names_the_codes_that_it_takes(tmp_path: Path) -> None:
    file = tmp_path / "domain.toml"
    file.write_text(
        'extends = "ihe"\n[vocabulary]\nmimeType = ["Application/dicom"]\n'
        'classCode = [{ code = "IMAGES", scheme = "1.2" }]\n'
    )
    vocabulary = read_profile(file).vocabulary
    assert vocabulary.allows("classCode", Code("IMAGES", "1.2", "whatever it is called"))
    assert not vocabulary.allows("classCode", Code("IMAGES", "1.3"))
    assert vocabulary.allows("typeCode", Code("anything", "1.3"))
    assert vocabulary.allows_media_type("application/dicom")
    assert not vocabulary.allows_media_type("text/plain")


@pytest.mark.parametrize(
    "line", ['classcode = [{ code = "a", scheme = "b" }]', "classCode = []", 'classCode = ["a"]', 'mimeType = "a/b"']
)
def test_a_vocabulary_that_is_wrong_is_told(tmp_path: Path, line: str) -> None:
    file = tmp_path / "domain.toml"
    file.write_text(f'extends = "ihe"\n[vocabulary]\n{line}\n')
    with pytest.raises(ConfigurationError, match="vocabulary"):
        read_profile(file)
