"""`make bench`: every benchmark of the tree, side by side with its peers."""

import sys

from tests.bench.bench_receive import main

sys.exit(main())
