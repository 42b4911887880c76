"""Flow models with all that turns prompts into images."""

from egrpo_jax.pipelines.base import Pipeline
from egrpo_jax.pipelines.registry import ModelConfig, load_pipeline

__all__ = ["ModelConfig", "Pipeline", "load_pipeline"]
