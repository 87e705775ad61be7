"""`python -m sparsemix` is `sparsemix`."""

from sparsemix.cli import main

if __name__ == "__main__":
    main()
