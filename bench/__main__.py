"""`./run bench`: the same as `sparsemix bench`."""

import sys

from sparsemix.cli import main

sys.argv.insert(1, "bench")
main()
