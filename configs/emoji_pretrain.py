"""The embedded flow model: a FLUX of 1.5 M parameters on 32x32 emoji.

python -m egrpo_jax.pretrain --config configs/emoji_pretrain.py
"""

import ml_collections

from egrpo_jax.config import to_config_dict
from egrpo_jax.pretraining.flow import FlowJob


def get_config() -> ml_collections.ConfigDict:
    return to_config_dict(FlowJob())
