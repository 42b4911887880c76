"""The device mesh, and how parameters and samples lie on it."""
