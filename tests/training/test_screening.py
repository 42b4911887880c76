"""Which prompts train where an algorithm chooses among candidates."""

import dataclasses

import jax
import numpy as np
import pytest

from egrpo_jax.common.config import from_config_dict
from egrpo_jax.flow.solver import Euler, solve
from egrpo_jax.parallel.mesh import make_mesh
from egrpo_jax.rewards import Scores
from egrpo_jax.rl.transitions import initial_noise, prompt_keys
from egrpo_jax.run.timing import PhaseTimer
from egrpo_jax.training.config import TrainConfig
from egrpo_jax.training.job import make_job
from egrpo_jax.training.phases import make_phases
from egrpo_jax.training.screening import Given, choose_prompts, updated
from egrpo_jax.training.state import Running
from tests import toy

CONFIG = dataclasses.replace(from_config_dict(TrainConfig, toy.get_config("ada_grpo")), prompts_per_iteration=4)


@pytest.fixture(scope="module")
def made():
    mesh = make_mesh(CONFIG.mesh)
    with jax.set_mesh(mesh):
        job = make_job(CONFIG, mesh)
        yield job, make_phases(job), job.pipeline.load(mesh)


def given(job):
    prompts = job.prompts[:12]
    return Given(prompts, job.pipeline.encode(prompts), prompt_keys(jax.random.key(5), 0, 12))


@pytest.mark.parametrize("mean", [-0.05, 0.0, 0.02, None])
def test_of_three_the_prompt_whose_anchor_is_nearest_to_the_mean_trains(made, mean):
    job, phases, params = made
    candidates = given(job)
    running = None if mean is None else Running(mean, 1.0)
    chosen = choose_prompts(job, phases, params, candidates, running, PhaseTimer())

    noise = initial_noise(candidates.keys, job.pipeline.latents_shape)
    ends = solve(Euler(), job.pipeline.velocity, params, noise, job.plan.times, candidates.conditioning)
    rewards = np.asarray(toy.redness(job.pipeline.decode(params, ends), candidates.prompts)).reshape(4, 3)
    expected = 3 * np.arange(4) + abs(rewards - (rewards.mean() if mean is None else mean)).argmin(1)
    assert list(chosen.prompts) == [candidates.prompts[row] for row in expected]
    np.testing.assert_array_equal(chosen.anchors[1], expected)
    np.testing.assert_array_equal(jax.random.key_data(chosen.keys), jax.random.key_data(candidates.keys[expected]))
    np.testing.assert_array_equal(chosen.conditioning["text"], candidates.conditioning["text"][expected])
    anchors = phases.take(*chosen.anchors)
    np.testing.assert_allclose(anchors.latents[:, 0], noise[expected], atol=1e-6)
    assert anchors.velocity.shape == (4, 2, *job.pipeline.latents_shape)


def test_a_candidate_without_a_score_is_not_chosen(made, monkeypatch):
    job, phases, params = made
    (reward,) = CONFIG.rewards.train

    class Half:
        """Scores the first two of three."""

        def start(self, images, prompts):
            scores = np.asarray(toy.redness(images, prompts), np.float32)
            return lambda: Scores(scores, np.arange(len(scores)) % 3 != 2)

    monkeypatch.setitem(job.rewards, reward, Half())
    chosen = choose_prompts(job, phases, params, given(job), Running(0.0, 1.0), PhaseTimer())
    assert not set(chosen.anchors[1] % 3) & {2}


def test_the_running_mean(made):
    job, (name,) = made[0], CONFIG.rewards.train
    values = np.array([1.0, 3.0, 100.0], np.float32)
    scores = {name: Scores(values, np.array([True, True, False]))}
    first = updated(None, job, scores)
    assert first == Running(2.0, 1.0)
    assert updated(Running(0.0, 6.0), job, scores) == pytest.approx((0.4, 5.0))
    assert updated(first, job, {name: Scores(values, np.zeros(3, bool))}) == first
