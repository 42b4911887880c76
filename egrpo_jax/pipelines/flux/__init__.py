"""FLUX.1."""

from egrpo_jax.pipelines.base import Family
from egrpo_jax.pipelines.flux.export import EXPORTERS
from egrpo_jax.pipelines.flux.options import DANCE_GRPO, FLOW_GRPO, FluxLora, FluxOptions, lighter
from egrpo_jax.pipelines.flux.spec import flux_pipeline, flux_sketch
from egrpo_jax.pipelines.flux.text import flux_encoder

FLUX = Family(
    "flux",
    flux_pipeline,
    flux_sketch,
    path="the folder of a FLUX.1 pipeline, or its name on the Hub, org/name",
    encoder=flux_encoder,
    exporters=EXPORTERS,
    exact={"int8_base": False},
    lighter=lighter,
)

__all__ = ["DANCE_GRPO", "FLOW_GRPO", "FLUX", "FluxLora", "FluxOptions"]
