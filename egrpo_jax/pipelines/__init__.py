"""Flow models with all that turns prompts into images."""

from egrpo_jax.pipelines.base import Export, Pipeline
from egrpo_jax.pipelines.registry import EXPORTS, ModelConfig, load_encoder, load_pipeline, load_writer

__all__ = ["EXPORTS", "Export", "ModelConfig", "Pipeline", "load_encoder", "load_pipeline", "load_writer"]
