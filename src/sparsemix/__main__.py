"""`python -m sparsemix` is `sparsemix`."""

from sparsemix.cli import main

main()
