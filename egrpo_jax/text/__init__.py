"""Tokenizers, and the text encoder of the emoji task."""
