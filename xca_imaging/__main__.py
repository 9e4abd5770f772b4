"""`python -m xca_imaging` is the `xca-imaging` command."""

import sys

from xca_imaging.cli.main import main

sys.exit(main())
