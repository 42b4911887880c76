"""The example, as a person starts it."""

import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from egrpo_jax.rl.algorithms.base import ALGORITHMS
from tests import programs


@pytest.mark.slow
def test_every_algorithm_raises_the_reward(tmp_path):
    out = tmp_path / "points.png"
    command = [sys.executable, "-m", "examples.points", "--out", out]
    done = subprocess.run(command, cwd=programs.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = {name: (float(a), float(b)) for name, a, b in re.findall(r"^(\w+) +(0\.\d+) +(0\.\d+)", done.stdout, re.M)}
    assert list(found) == list(ALGORITHMS)
    assert len({before for before, _ in found.values()}) == 1  # the base model's
    for name, (before, after) in found.items():
        assert after > before + 0.25, name  # from 0.32 to between 0.67 and 0.85
    check_panels(np.asarray(Image.open(out).convert("RGB")), count=len(ALGORITHMS) + 2)


def check_panels(image, count, columns=5):
    """There are so many, and none is blank."""
    height, width = image.shape[0] // -(-count // columns), image.shape[1] // columns
    assert min(height, width) > 300
    for index in range(count):
        top, left = index // columns * height, index % columns * width
        colours = np.unique(image[top : top + height, left : left + width].reshape(-1, 3), axis=0)
        assert len(colours) > 50, index
