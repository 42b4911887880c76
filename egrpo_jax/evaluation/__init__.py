"""Judging a model: sampling, scoring, statistics, and the record of how it was done."""
