"""Tests run on the CPU, whatever else the machine has, and compile fast, nothing twice; so do programs they start."""

import atexit
import os
import shutil
import tempfile

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
# Compiling is most of what tests do, and half of that is LLVM's optimisation. XLA_FLAGS that are set, if to nothing,
# stay as they are.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers take the folder of the process that started them
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="egrpo_jax_compiled_")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


@pytest.fixture(scope="module", autouse=True)
def forget_compiled_code():
    """After each module: else a worker comes to hold 6 GB, which slows it."""
    yield
    import jax  # after what is set above

    jax.clear_caches()
