"""The paper's run with cheaper tails: E-GRPO on all weights of FLUX.1-dev in 400 forward passes a prompt, not 1012.

    python -m egrpo_jax.train --config configs/flux_egrpo_fast.py

Tails are environment, not policy: what a cheaper one may cost is the order of rewards within a group. Four steps of
DPM-Solver++(2M) in the place of 6 to 15 of Euler's keep it: on the embedded model, at this run's grid, threshold and
group size, the rank correlation with full tails is .976 [.973, .979]; that of three steps, 304 passes, .954 [.947,
.962], and that of Euler's on every fourth step, as cheap as three, .916 (docs/results/analysis_t16.md). On FLUX it has
not been measured:

    python -m egrpo_jax.analyze --config configs/flux_egrpo.py --steps 0,4,7 --replicates 3 --out analysis

One epoch, as in the paper: the update is 6 % of the work here, and more of them have not been compared. All else, and
what hardware it needs, is that of configs/flux_egrpo.py, at two fifths of its work: 8 prompts at 40 % of 8 x 989
TFLOP/s take about 40 s an iteration, computed. No time has been measured.
"""

import dataclasses

import ml_collections

from egrpo_jax.rl.algorithms.egrpo import EGrpo
from egrpo_jax.training.config import RewardsConfig, train_config
from egrpo_jax.training.tasks import on_flux

FAST = on_flux(
    EGrpo(tail_strides=(), tail_steps=(4,)), RewardsConfig(train=("hpsv2.1",)), prompts=8, learning_rate=2e-6
)


def get_config() -> ml_collections.ConfigDict:
    """The run on HPSv2.1; other rewards are held out."""
    return train_config(dataclasses.replace(FAST, name="flux_egrpo_fast", prompts_per_rollout=None))
