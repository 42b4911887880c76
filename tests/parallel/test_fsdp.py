"""Split parameters inside shard_map: gathered when a layer reads them, their gradients scattered and summed."""

import os
import subprocess
import sys

from tests.programs import ROOT


def test_a_stack_whose_weights_are_split_computes_the_same():
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "8"}
    command = [sys.executable, "-m", "tests.parallel.on_a_mesh"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
