"""Where the data folders (`profiles/`, `wsdl/`) are: in a checkout beside the package, installed below `sys.prefix`.

The wheel carries them as data files under `share/xca-imaging/`, so that an installed node runs outside a checkout.
"""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

from xca_imaging.errors import ConfigurationError

_CHECKOUT = Path(__file__).resolve().parent.parent


def data_folder(name: str) -> Path:
    """Return the folder of data files called `name`.

    A checkout is told from site-packages by its `setup.cfg`: a folder of that name beside an installed package would be
    somebody else's.

    Raises
    ------
    ConfigurationError
        The folder is nowhere: the installation is damaged.
    """
    candidates = [Path(base) / "share" / "xca-imaging" / name for base in _data_bases()]
    if (_CHECKOUT / "setup.cfg").is_file():
        candidates.insert(0, _CHECKOUT / name)
    for folder in candidates:
        if folder.is_dir():
            return folder
    tried = ", ".join(map(str, candidates))
    raise ConfigurationError(tried, "", f"the data folder {name!r} is missing", "install the package again")


def _data_bases() -> list[str]:
    """`sys.prefix` first; a `pip install --user` puts data files below the user's base instead."""
    bases = [sys.prefix, sysconfig.get_path("data")]
    if "posix_user" in sysconfig.get_scheme_names():
        bases.append(sysconfig.get_path("data", "posix_user"))
    return list(dict.fromkeys(bases))
