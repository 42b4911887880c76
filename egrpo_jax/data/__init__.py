"""Prompts, stored embeddings, and the emoji task."""
