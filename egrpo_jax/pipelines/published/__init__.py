"""Flow models as they are published: folders that diffusers writes, of any family here."""

from egrpo_jax.pipelines.base import Source
from egrpo_jax.pipelines.published.export import EXPORTERS
from egrpo_jax.pipelines.published.options import DANCE_GRPO, FLOW_GRPO, LoraOptions, PublishedOptions, lighter
from egrpo_jax.pipelines.published.spec import published_encoder, published_pipeline, published_sketch

PUBLISHED = Source(
    "published",
    published_pipeline,
    published_sketch,
    path="the folder of a pipeline, as diffusers writes it, or its name on the Hub, org/name",
    encoder=published_encoder,
    exporters=EXPORTERS,
    exact={"int8_base": False},
    lighter=lighter,
)

__all__ = ["DANCE_GRPO", "FLOW_GRPO", "PUBLISHED", "LoraOptions", "PublishedOptions"]
