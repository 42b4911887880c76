"""The paper's run: E-GRPO on all weights of FLUX.1-dev (arXiv:2601.00423, section 5.1).

    python -m egrpo_jax.train --config configs/flux_egrpo.py:hps        # trained on HPSv2.1
    python -m egrpo_jax.train --config configs/flux_egrpo.py:hps,clip   # on HPSv2.1 and the CLIP score

What the paper does not state is the reference code's: 720x720 pixels, 12 samples a group, clip range 1e-4. Prompts are
a file of your own, by default `hpd_train.txt`; `python -m egrpo_jax.encode` makes their embeddings once, so that no
text encoder is loaded: --config.model.published.embeddings=FOLDER.

Hardware: 4 TPU v5p, 8 TPU v6e, or 8 GPUs of 80 GB. Memory on each of D: weights and two moments in float32 are 143 GB
/ D; an update needs gradients, 48 GB / D, the working copy in bfloat16, 24 GB / D, and about 3 GB of activations beside
them; four scorers in float32, 13.6 GB / D, stay. `python -m egrpo_jax.plan` compiles it for a slice: docs/scaling.md.
Work, computed: a prompt is 1012 forward passes in the rollout and 8 forward and backward passes of 37.3 TFLOP, 38.6
PFLOP in all, of which the update is 2 %: 8 prompts at 40 % of 8 x 989 TFLOP/s take about 100 s an iteration, and 300
iterations 8 hours. No time has been measured.
"""

import dataclasses

import ml_collections

from egrpo_jax.parallel.mesh import MeshConfig
from egrpo_jax.pipelines import ModelConfig
from egrpo_jax.pipelines.published import PublishedOptions
from egrpo_jax.rl.learner import LearnerConfig
from egrpo_jax.training.config import EvaluationConfig, RewardsConfig, TrainConfig, train_config

REWARDS = {"hps": "hpsv2.1", "clip": "clip_score"}
JUDGES = ("pickscore", "imagereward")

FLUX = TrainConfig(
    name="flux_egrpo",
    num_iterations=300,
    prompts="hpd_train.txt",
    prompts_per_iteration=8,
    tails_per_device=12,
    model=ModelConfig(name="published", path="black-forest-labs/FLUX.1-dev", published=PublishedOptions()),
    learner=LearnerConfig(micro_batch=1),
    evaluation=EvaluationConfig(prompts="hpd_test.txt", every=50, batch=8),
    mesh=MeshConfig(data=1, fsdp=-1),
)


def get_config(rewards: str = "hps") -> ml_collections.ConfigDict:
    """The run on `rewards`, "hps" or "hps,clip"; the others are held out."""
    names = rewards.split(",")
    if not set(names) <= REWARDS.keys():
        raise ValueError(f"configs/flux_egrpo.py has the rewards {sorted(REWARDS)}, found {rewards!r}")
    train = tuple(REWARDS[name] for name in names)
    heldout = tuple(reward for reward in (*REWARDS.values(), *JUDGES) if reward not in train)
    chosen = RewardsConfig(train=train, weights=(1.0,) * len(train), heldout=heldout)
    return train_config(dataclasses.replace(FLUX, rewards=chosen))
