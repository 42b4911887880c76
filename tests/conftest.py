"""Tests run on the CPU, whatever else the machine has; so do the programs that they start."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
