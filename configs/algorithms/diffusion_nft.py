"""DiffusionNFT (arXiv:2509.16117) on LoRA adapters of FLUX.1-dev, and on the embedded emoji model.

    python -m egrpo_jax.train --config configs/algorithms/diffusion_nft.py
    python -m egrpo_jax.train --config configs/algorithms/diffusion_nft.py:emoji     # on a laptop

Its authors trained SD3.5; for FLUX these are the settings of Flow-Factory, at 384x384 pixels. The shift is that of
diffusers' grid there, e^0.554. Hardware: that of configs/flux_lora.py for each prompt that is rolled out at once; no
time has been measured.
"""

import ml_collections

from egrpo_jax.pipelines.published import FLOW_GRPO
from egrpo_jax.rl.algorithms.diffusion_nft import DiffusionNft
from egrpo_jax.rl.learner import LearnerConfig
from egrpo_jax.training.config import RewardsConfig
from egrpo_jax.training.tasks import choose, on_emoji, on_flux

LEARNER = LearnerConfig(samples="trailing", trailing_decay=0.5)

VARIANTS = {
    "": on_flux(
        DiffusionNft(num_steps=8, shift=1.741, group_size=16, pairs=2, noisiest=0.7),
        RewardsConfig(train=("pickscore",)),
        prompts=48,
        learning_rate=3e-4,
        learner=LEARNER,
        pixels=384,
        lora=FLOW_GRPO,
    ),
    "emoji": on_emoji(DiffusionNft(num_steps=8, group_size=8, pairs=4), LEARNER),
}


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """The config of one of `VARIANTS`."""
    return choose(VARIANTS, variant)
