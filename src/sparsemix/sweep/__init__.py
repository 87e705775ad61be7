"""Many runs: what to compare, how large, on which processes, and what came out."""
