"""`sparsemix bench`: what is ours beside every peer at hand, in one process, refused where they disagree."""
