"""Flow models with all that turns prompts into images."""

from egrpo_jax.pipelines.base import Export, Pipeline
from egrpo_jax.pipelines.registry import (
    EXPORTS,
    ModelConfig,
    exact_model,
    lighter_options,
    load_encoder,
    load_pipeline,
    load_writer,
    sketch_pipeline,
)

__all__ = [
    "EXPORTS",
    "Export",
    "ModelConfig",
    "Pipeline",
    "exact_model",
    "lighter_options",
    "load_encoder",
    "load_pipeline",
    "load_writer",
    "sketch_pipeline",
]
