"""Timings: interleaved runs of an op against its reference, refused when they disagree."""
