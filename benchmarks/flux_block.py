"""The FLUX.1 transformer here against diffusers' on the same machine, side by side in one run.

On the CPU, two blocks of one kind and four of the other, float32, two threads for either:

    python -m benchmarks.flux_block --size=small --rounds=20

On a GPU, FLUX.1-dev with random bfloat16 weights at 720 and 1024 pixels square, without and with the backward pass:

    python -m benchmarks.flux_block --size=dev --pixels=720,1024 --batch=1,2,4,8 --remat=blocks

needs the `oracle` extra; without PyTorch for the device, `--peer=false` measures ours alone. Outputs are compared
before anything is timed. Rounds alternate, so that what else the machine does falls on both. Printed for each setting:
the median and the minimum of seconds, the ratio ours / theirs of either, images (velocities) a second, and on a GPU the
share of a measured matrix product's rate that the model's own operations reach (three times the forward pass with the
backward pass; what is computed again is not counted).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks.measure import alternate, matmul_rate
from benchmarks.random_flux import SMALL, copy_weights, diffusers_model, random_params, token_ids
from egrpo_jax import cli
from egrpo_jax.models.flux import Flux, FluxConfig, forward_flops
from egrpo_jax.weights.layout import Params

FLAGS = flags.FlagValues()
SIZE = flags.DEFINE_enum(
    "size", "small", ["small", "dev"], "The model: `small`, or FLUX.1-dev, 12 billion parameters.", flag_values=FLAGS
)
PIXELS = flags.DEFINE_list("pixels", ["256"], "Height and width of the square images.", flag_values=FLAGS)
BATCH = flags.DEFINE_list("batch", ["4"], "Samples at once.", flag_values=FLAGS)
TEXT = flags.DEFINE_integer("text_tokens", 64, "Text tokens; 512 is FLUX.1-dev's.", flag_values=FLAGS)
REMAT = flags.DEFINE_enum(
    "remat", "none", ["none", "projections", "blocks"], "What ours computes again.", flag_values=FLAGS
)
UNROLL = flags.DEFINE_integer("unroll", 1, "Blocks in one trip of our scan.", flag_values=FLAGS)
BACKWARD = flags.DEFINE_bool("backward", True, "Time gradients by all parameters too.", flag_values=FLAGS)
PEER = flags.DEFINE_bool("peer", True, "Time diffusers too.", flag_values=FLAGS)
THREADS = flags.DEFINE_integer("threads", 2, "PyTorch's threads on the CPU.", flag_values=FLAGS)
ROUNDS = flags.DEFINE_integer("rounds", 10, "Alternating measurements.", flag_values=FLAGS)

Pass = Callable[[], object]
"""One pass, finished when it returns."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """A model and the shape of what it is given."""

    config: FluxConfig
    grid: tuple[int, int]
    text_tokens: int
    batch: int

    @property
    def flops(self) -> int:
        """Operations of one forward pass."""
        return self.batch * forward_flops(self.config, self.grid[0] * self.grid[1], self.text_tokens)

    def arguments(self) -> dict[str, np.ndarray]:
        """Random inputs of the model by name, float32."""
        rng = np.random.default_rng(0)
        return {
            "latents": rng.standard_normal((self.batch, self.grid[0] * self.grid[1], self.config.in_channels), "f4"),
            "time": rng.integers(1, 5, self.batch).astype("f4") / 4,  # 1000 of these are exact in bfloat16
            "text": rng.standard_normal((self.batch, self.text_tokens, self.config.text_dim), "f4"),
            "pooled": rng.standard_normal((self.batch, self.config.pooled_dim), "f4"),
            "guidance": np.full(self.batch, 4, "f4"),
        }


def settings() -> Iterator[Setting]:
    """What the flags ask for."""
    config = FluxConfig() if SIZE.value == "dev" else SMALL
    for pixels in map(int, PIXELS.value):
        for batch in map(int, BATCH.value):
            yield Setting(config, (pixels // 16, pixels // 16), TEXT.value, batch)


def on_gpu() -> bool:
    """Whether JAX's default device is a GPU; there, both models are in bfloat16."""
    return jax.default_backend() == "gpu"


def our_dtype() -> Any:
    """The dtype of our weights and computations."""
    return jnp.bfloat16 if on_gpu() else jnp.float32


def our_passes(setting: Setting, params: Params) -> tuple[Callable[[], np.ndarray], Pass]:
    """The forward pass, and the gradients of the velocity's sum of squares by all parameters."""
    model = Flux(setting.config, dtype=our_dtype(), unroll=UNROLL.value, remat=REMAT.value)
    arguments = {name: jnp.asarray(array) for name, array in setting.arguments().items()}
    velocity = lambda params, arguments: model.apply({"params": params}, **arguments, grid=setting.grid)
    forward = jax.jit(velocity)
    backward = jax.jit(jax.grad(lambda params, arguments: jnp.square(velocity(params, arguments)).sum()))
    return (
        lambda: np.asarray(forward(params, arguments)),
        lambda: jax.block_until_ready(backward(params, arguments)),
    )


def their_passes(setting: Setting, params: Params) -> tuple[Callable[[], np.ndarray], Pass]:
    """The same of diffusers' model with the same weights; compiled by PyTorch on a GPU."""
    import torch

    torch.set_num_threads(THREADS.value)
    device, dtype = ("cuda", torch.bfloat16) if on_gpu() else ("cpu", torch.float32)
    model = diffusers_model(setting.config, device, dtype)
    copy_weights(setting.config, params, model)
    if REMAT.value == "blocks":
        model.enable_gradient_checkpointing()
    run = torch.compile(model) if on_gpu() else model
    given = {name: torch.from_numpy(array).to(device, dtype) for name, array in setting.arguments().items()}
    ids = token_ids(setting.text_tokens, setting.grid, device)

    def velocity() -> torch.Tensor:
        return run(
            given["latents"], given["text"], given["pooled"], given["time"], guidance=given["guidance"],
            **ids, return_dict=False,
        )[0].float()  # fmt: skip

    def forward() -> np.ndarray:
        with torch.no_grad():
            return velocity().cpu().numpy()

    def backward() -> None:
        model.zero_grad()
        velocity().square().sum().backward()
        if on_gpu():
            torch.cuda.synchronize()

    return forward, backward


def compare_outputs(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Raises where the two models do not compute the same thing; prints how near they are."""
    error = np.abs(ours - theirs).max() / np.abs(theirs).max()
    print(f"  largest difference of velocities / largest velocity: {error:.1e}")
    if not error <= (0.1 if on_gpu() else 1e-5):
        raise AssertionError("not the same velocities")


def report(kind: str, taken: np.ndarray, setting: Setting, flops: int, rate: float | None) -> None:
    """One line for each model, and the ratios."""
    for who, column in zip(("ours", "theirs"), taken.T, strict=False):
        share = f", {flops / column.min() / rate:.0%} of the matrix product's rate" if rate else ""
        print(
            f"  {kind} {who:6}: median {np.median(column):.4f} s, minimum {column.min():.4f} s, "
            f"{setting.batch / column.min():.2f} images/s{share}"
        )
    if taken.shape[1] == 2:
        print(
            f"  {kind} ours / theirs: median of rounds {np.median(taken[:, 0] / taken[:, 1]):.2f}, "
            f"of minima {taken[:, 0].min() / taken[:, 1].min():.2f}"
        )


def measure(setting: Setting, params: Params, rate: float | None) -> None:
    """Compares, times and prints one setting."""
    print(f"{SIZE.value}, grid {setting.grid}, {setting.text_tokens} text tokens, batch {setting.batch}")
    models = [our_passes(setting, params), *([their_passes(setting, params)] if PEER.value else [])]
    if PEER.value:
        compare_outputs(*(forward() for forward, _ in models))
    report("forward", alternate([forward for forward, _ in models], ROUNDS.value), setting, setting.flops, rate)
    if BACKWARD.value:
        taken = alternate([backward for _, backward in models], ROUNDS.value)
        report("forward and backward", taken, setting, 3 * setting.flops, rate)


def main() -> None:
    """Measures every setting, smallest batch first."""
    rate = matmul_rate() if on_gpu() else None
    every = list(settings())
    params = random_params(every[0].config, our_dtype())
    for setting in every:
        measure(setting, params, rate)


if __name__ == "__main__":
    cli.run(main, FLAGS)
