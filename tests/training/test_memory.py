"""Memory over a long run."""

import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SETTLED, MEASURED = 250, 200


@pytest.mark.slow
def test_a_run_grows_by_less_than_a_megabyte_in_200_iterations(tmp_path):
    command = [sys.executable, "-m", "tests.training.measure_memory", tmp_path, str(SETTLED + MEASURED)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *_, printed = (line for line in done.stdout.splitlines() if line.replace(" ", "").isdigit())
    resident = [int(kilobytes) for kilobytes in printed.split()]
    assert len(resident) == SETTLED + MEASURED
    before, after = (statistics.median(resident[end - 25 : end]) for end in (SETTLED, SETTLED + MEASURED))
    assert after - before < 1024, resident[::10]
