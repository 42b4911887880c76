"""Split parameters inside shard_map: gathered when a layer reads them, their gradients scattered and summed."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from egrpo_jax.models.layers import Linear, scan_blocks
from egrpo_jax.parallel.fsdp import Layout
from egrpo_jax.parallel.mesh import REPLICATED, SAMPLES, over_samples, spread
from egrpo_jax.parallel.rules import with_shardings
from tests.parallel import on_devices

RULES = ((r"/kernel$", PartitionSpec("fsdp", None)),)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jnp.tanh(nn.RMSNorm(name="norm")(Linear(8, name="linear")(x))), None


class Stack(nn.Module):
    @nn.compact
    def __call__(self, x):
        x, _ = scan_blocks(Block, 3, remat="blocks")(name="blocks")(Linear(8, name="first")(x))
        return x
