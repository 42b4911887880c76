"""How images of a group differ, as one more reward."""

import jax
import numpy as np
import pytest

from egrpo_jax.common.config import from_config_dict
from egrpo_jax.common.errors import ConfigError
from egrpo_jax.common.trees import combine
from egrpo_jax.parallel.mesh import make_mesh
from egrpo_jax.rl.transitions import prompt_keys
from egrpo_jax.run.timing import PhaseTimer
from egrpo_jax.training.config import TrainConfig
from egrpo_jax.training.iteration import assign_credit, sample_and_score
from egrpo_jax.training.job import make_job
from egrpo_jax.training.phases import make_phases
from egrpo_jax.training.scoring import DIVERSITY, group_distance
from egrpo_jax.training.screening import Given
from tests import toy

ROOT = np.sqrt(0.5)


def test_the_distance_from_the_others():
    features = np.array([[[1, 0], [0, 1], [ROOT, ROOT]], [[1, 0], [1, 0], [0, 0]]])
    finite = np.array([[True, True, True], [True, True, False]])
    found = group_distance(features, finite)
    near = 1 - ROOT
    np.testing.assert_allclose(found.values, [[(1 + near) / 2, (1 + near) / 2, near], [0, 0, 0]], atol=1e-6)
    np.testing.assert_array_equal(found.came, finite)
    alone = group_distance(features[1], np.array([True, False, False]))
    assert not alone.came.any()


def config(**changes):
    found = toy.get_config()
    rewards = {"rewards.train": ("tests.toy:compares",), "rewards.diversity_by": "tests.toy:compares"}
    found.update_from_flattened_dict(rewards | {"rewards.diversity": 0.5} | changes)
    return from_config_dict(TrainConfig, found)


def test_diversity_is_a_reward_like_any_other():
    chosen = config()
    mesh = make_mesh(chosen.mesh)
    with jax.set_mesh(mesh):
        job = make_job(chosen, mesh)
        phases, params = make_phases(job), job.pipeline.load(mesh)
        prompts = job.prompts[:8]
        keys = prompt_keys(jax.random.key(0), 0, 8)
        given = Given(prompts, job.pipeline.encode(prompts), keys)
        samples = sample_and_score(job, phases, combine(params, params), (), given, PhaseTimer())
        rollout = phases.rollout(params, (), given.conditioning, keys)
        colour = toy.compares.encode_images(job.pipeline.decode(params, rollout.latents))
        whole = np.empty_like(colour)
        whole[phases.deal.sample] = colour
        vectors = whole.reshape(8, 2, 1, 4, 3)
        found = samples.scores[DIVERSITY]
        for place in np.ndindex(8, 2, 1, 4):
            others = [vectors[place[:3]][g] for g in range(4) if g != place[3]]
            expected = np.mean([1 - vectors[place] @ other for other in others])
            np.testing.assert_allclose(found.values[place], expected, atol=1e-5)
        assert found.came.all()

        score = lambda name: samples.scores[name].values
        relative = lambda x: (x - x.mean(-1, keepdims=True)) / (x.std(-1, keepdims=True, ddof=1) + 1e-8)
        advantage, _ = assign_credit(phases, chosen.rewards, samples.scores)
        by_hand = relative(score("tests.toy:compares")) + 0.5 * relative(score(DIVERSITY))
        np.testing.assert_allclose(advantage, by_hand[:, :, 0], atol=2e-3)


@pytest.mark.parametrize(
    ("changes", "found"),
    [({"diversity_by": "emoji"}, "'emoji'"), ({"diversity_by": None}, "None"), ({"diversity": 0.0}, "'tests.toy:comp")],
)
def test_it_needs_a_reward_of_the_run(changes, found):
    with pytest.raises(ConfigError, match=rf"^config\.rewards\.diversity_by: found {found}.*, expected one of tests"):
        config(**{f"rewards.{key}": value for key, value in changes.items()})


def test_it_needs_a_reward_that_compares_images():
    blind = config(**{"rewards.diversity_by": "tests.toy:brightness"})
    mesh = make_mesh(blind.mesh)
    line = (
        r"found 'tests\.toy:brightness', expected a reward that compares images; of this run these do: tests\.toy:comp"
    )
    with jax.set_mesh(mesh), pytest.raises(ConfigError, match=line):
        make_job(blind, mesh)
