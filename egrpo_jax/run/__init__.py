"""Traces of a run on disk: checkpoints, its workdir, metrics; and signals."""
