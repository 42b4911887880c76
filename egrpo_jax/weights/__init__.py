"""Weights on disk: files, layouts, adapters, and the names of the published models."""
