"""Results of `sparsemix bench`, and plain PyTorch to compare with; the works are in src/sparsemix/bench."""
