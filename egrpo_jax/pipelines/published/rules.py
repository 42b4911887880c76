"""Rules by which the parameters of FLUX.1, and of the embedded model of its kind, are sharded."""

from __future__ import annotations

from jax.sharding import PartitionSpec

from egrpo_jax.parallel.rules import INTO_TENSOR, OUT_OF_TENSOR, Rules

_KERNEL = r"/kernel(/values)?$"  # the scales of kernels in int8 are small, and replicated
_OUT = rf"(image_out|text_out|out|(_ff|_in)/linear_2){_KERNEL}"
TRANSFORMER_RULES: Rules = ((_OUT, OUT_OF_TENSOR), (r"(^|/)kernel$", INTO_TENSOR))
"""For a pipeline whose parameters are the transformer's alone."""
FLUX_RULES: Rules = (
    (rf"(^|/)flow/.*{_OUT}", OUT_OF_TENSOR),
    (r"(^|/)t5/.*(out|mlp_out)/kernel$", OUT_OF_TENSOR),
    (rf"(^|/)(flow|t5)/.*{_KERNEL}", INTO_TENSOR),
    (r"(^|/)t5/tokens/embedding$", PartitionSpec("tensor", "fsdp")),
    # Adapters split the axis that they share with the layer they adapt.
    (r"(^|/)lora/.*/a$", PartitionSpec("fsdp", None)),
    (r"(^|/)lora/.*/b$", PartitionSpec(None, "fsdp")),
)
"""For FLUX.1's transformer and T5; CLIP and the VAE, 0.2 B parameters, are replicated. The moments of the optimizer and
averages lie as their parameters do."""
