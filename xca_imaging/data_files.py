"""Where the data folders (`profiles/`, `wsdl/`) are: in a checkout beside the package, else where it was installed.

The wheel carries them as data files under `share/xca-imaging/`, so that an installed node runs outside a checkout.
"""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from xca_imaging.errors import ConfigurationError

_PARENT = Path(__file__).resolve().parent.parent


def data_folder(name: str) -> Path:
    """Return the folder of data files called `name`.

    A checkout is told from site-packages by its `setup.cfg`: a folder of that name beside an installed package would be
    somebody else's.

    Raises
    ------
    ConfigurationError
        The folder is nowhere: the installation is damaged.
    """
    candidates = [base / "share" / "xca-imaging" / name for base in _data_bases()]
    if (_PARENT / "setup.cfg").is_file():
        candidates.insert(0, _PARENT / name)
    for folder in candidates:
        if folder.is_dir():
            return folder
    tried = ", ".join(map(str, candidates))
    raise ConfigurationError(tried, "", f"the data folder {name!r} is missing", "install the package again")


def _data_bases() -> list[Path]:
    """Return where the installed distribution put its data files, as it recorded them: below `sys.prefix`, the user's
    base; beside the package after `pip install --target`, whose record is wrong about it."""
    try:
        recorded = distribution("xca-imaging").files or []
    except PackageNotFoundError:
        recorded = []
    found = {
        Path(str(file.locate())).resolve().parents[3]
        for file in recorded
        if file.parts[-4:-2] == ("share", "xca-imaging")
    }
    return [*found, Path(sys.prefix), _PARENT]
