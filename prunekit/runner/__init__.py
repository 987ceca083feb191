"""One run from a plain config: checks, stages, cache, results, sweeps."""
