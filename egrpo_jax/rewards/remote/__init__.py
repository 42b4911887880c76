"""Rewards over HTTP, both ends."""
