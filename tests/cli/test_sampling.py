"""The flags that say what is sampled."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from absl import flags

from egrpo_jax.cli.sampling import LAST_SEED, SamplingFlags
from egrpo_jax.common.errors import UserError
from egrpo_jax.flow.grid import shifted_times
from egrpo_jax.training.config import EvaluationConfig, TrainConfig


def sampling(*arguments):
    values = flags.FlagValues()
    chosen = SamplingFlags(values)
    values(["program", *arguments])
    return chosen


def test_a_prompt_may_hold_commas_and_quotes():
    chosen = sampling("--prompt", 'a cat, a dog and "a sign"', "--prompt= red heart ")
    assert chosen.prompts() == ("--prompt", ['a cat, a dog and "a sign"', "red heart"])


def test_prompts_of_a_file_and_by_default(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("one\ntwo\n")
    assert sampling(f"--prompt_file={file}").prompts("emoji_heldout") == (str(file), ["one", "two"])
    assert sampling().prompts(str(file)) == (str(file), ["one", "two"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected --prompt, once for each prompt, or --prompt_file"),
        (["--prompt=a", "--prompt_file=emoji_heldout"], "found both"),
        (["--prompt=a", "--prompt= "], "--prompt: found ' ', expected a text"),
        (["--prompt=caf\udce9"], "expected UTF-8"),  # as Python reads a command line in Latin-1
    ],
)
def test_prompts_that_cannot_be(arguments, message):
    with pytest.raises(UserError, match=message):
        sampling(*arguments).prompts()


@pytest.mark.parametrize("seed", [-1, 2**32, 2**64])
def test_seeds_that_jax_does_not_tell_apart_are_refused(seed):
    with pytest.raises(flags.IllegalFlagValueError, match="--seed"):
        sampling(f"--seed={seed}")


@pytest.mark.parametrize("steps", [0, 10**9])
def test_steps_that_nobody_means_are_refused(steps):
    with pytest.raises(flags.IllegalFlagValueError, match="--steps"):
        sampling(f"--steps={steps}")


def test_the_last_seed_is_another_than_the_first():
    assert sampling(f"--seed={LAST_SEED}").seed == LAST_SEED
    noise = [jax.random.normal(jax.random.key(seed), (4,)) for seed in (0, LAST_SEED - 1, LAST_SEED)]
    assert len({tuple(np.asarray(row)) for row in noise}) == 3


@pytest.mark.parametrize(
    ("most", "prompts", "batch"),
    [(None, 3, 3), (None, 50, 50), (None, 51, 26), (8, 3, 3), (8, 8, 8), (8, 17, 6), (1, 3, 1)],
)
def test_a_batch_holds_little_that_is_thrown_away(most, prompts, batch):
    config = TrainConfig(evaluation=EvaluationConfig(batch=50))
    chosen = sampling(*([] if most is None else [f"--batch={most}"]))
    found = chosen.sampling(config, SimpleNamespace(sampling_times=None), prompts)
    assert (found.batch, found.times) == (batch, shifted_times(config.plan.num_steps, config.plan.shift))


def test_the_published_grid_is_the_models():
    chosen = sampling("--grid=pipeline", "--steps=28")
    found = chosen.sampling(TrainConfig(), SimpleNamespace(sampling_times=lambda steps: (1.0, steps / 56, 0.0)), 1)
    assert found.record() == {"steps": 2, "times": [1.0, 0.5, 0.0], "solver": "euler"}
    with pytest.raises(UserError, match="the model 'emoji' has no grid of its own"):
        chosen.sampling(TrainConfig(), SimpleNamespace(sampling_times=None), 1)
