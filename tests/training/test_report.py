"""What people see of a run's evaluations."""

import contextlib
import dataclasses
from types import SimpleNamespace

import jax
import pytest

from egrpo_jax.common.config import from_config_dict
from egrpo_jax.parallel.mesh import make_mesh
from egrpo_jax.run.metrics import MetricsWriter
from egrpo_jax.training.config import TrainConfig
from egrpo_jax.training.job import make_job
from egrpo_jax.training.report import Evaluator, report, warn_of_rounding
from egrpo_jax.training.state import Progress
from tests import toy

PROMPTS = ["cat", "two cats", "tree"]
FROZEN = dict.fromkeys(toy.params())
"""All parameters are trained."""


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(from_config_dict(TrainConfig, toy.get_config()).mesh)


@pytest.fixture
def job(mesh, tmp_path):
    """The toy's, evaluated on `PROMPTS`, with a batch far above their number."""
    config = toy.get_config()
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    config.evaluation.prompts, config.evaluation.batch = str(tmp_path / "prompts.txt"), 1000
    with jax.set_mesh(mesh):
        yield make_job(from_config_dict(TrainConfig, config), mesh)


@pytest.mark.parametrize(("found", "warned"), [(2e-4, True), (1e-4, False), (1e-7, False)])
def test_rollouts_that_round_by_more_than_the_clip_range_are_warned_of(capsys, found, warned):
    warn_of_rounding(TrainConfig(), {"ratio/rollout_deviation": found})
    line = capsys.readouterr().err
    assert ("rollout and update round differently: |r - 1| up to 2.0e-04" in line) == warned == bool(line)


def progress(iteration):
    state = SimpleNamespace(params=toy.params(seed=iteration, width=12), ema=None)
    return Progress(state, jax.random.key(0), iteration, 0)


def test_no_more_is_sampled_than_there_are_prompts(job, mesh, tmp_path):
    encoded = []
    encode = lambda prompts: encoded.append(len(prompts)) or job.pipeline.encode(prompts)
    counted = dataclasses.replace(job, pipeline=dataclasses.replace(job.pipeline, encode=encode))
    evaluate = Evaluator(counted, FROZEN, tmp_path, 0)
    evaluate(progress(0))
    assert encoded == [-(-len(PROMPTS) // mesh.shape["data"]) * mesh.shape["data"]]


def test_the_last_table_names_the_iterations_it_compares(job, tmp_path, capsys):
    evaluate = Evaluator(job, FROZEN, tmp_path, 0)
    with contextlib.closing(MetricsWriter(tmp_path, None)) as writer:
        for iteration in (3, 5, 8):
            writer.write(iteration, evaluate(progress(iteration)))
    report(job, evaluate.history, tmp_path)
    head, training, heldout, _ = capsys.readouterr().out.strip().splitlines()
    assert head == "3 evaluation prompts, fixed noise, iteration 3 -> 8, paired change with its 95 % interval:"
    assert training.split()[:2] == ["tests.toy:redness", "train"]
    assert heldout.split()[:3] == ["tests.toy:brightness", "held", "out"]
