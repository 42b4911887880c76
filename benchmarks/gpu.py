"""Speed and memory on one GPU: FLUX.1-dev with random bfloat16 weights at 720 x 720, T = 16, G = 12, tau = 2.2.

    python -m benchmarks.gpu --out=docs/results/speed.md

writes a table into `--out`, in place of an earlier one of the same card. The weights take 24 GB, of `full` 48. It was
made to end within 5 minutes and has not been run on a GPU yet. Each part runs in a process of its own, so that peaks
of memory are its own; `--parts` chooses:

- `forward`: one pass of the model on one sample, and on a group, by our model;
- `diffusers`: the same by diffusers' model, its blocks compiled by PyTorch, with PyTorch's attention (SDPA) and, where
  it is installed, FlashAttention 3; needs the `oracle` extra, with PyTorch for the GPU. That the two models compute the
  same is tested at small sizes (tests/oracle) and measured by `flux_block`;
- `lora`: our engine's rollout, its tails cut to one step, and its update, of Flow-GRPO's adapters;
- `full`: that rollout with all weights in float32, as they are trained. Their update needs 190 GB, so several cards.

Operations are those of the model's matrix products, three times the forward pass for an update; what is computed again
is not counted. Utilisation is their share of what a large matrix product reaches on the same card, and of the peak in
its data sheet. `--tiny` tries everything out on any device.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks.measure import alternate, matmul_rate
from benchmarks.random_flux import (
    GUIDANCE,
    Shape,
    diffusers_model,
    first_progress,
    random_pipeline,
    token_ids,
    training_job,
)
from egrpo_jax import cli
from egrpo_jax.common.trees import combine
from egrpo_jax.models.flux import FluxConfig
from egrpo_jax.models.lora import LoraConfig
from egrpo_jax.parallel.mesh import MeshConfig, compiled, make_mesh
from egrpo_jax.pipelines.families import FLUX
from egrpo_jax.rl.algorithms.egrpo import EGrpo
from egrpo_jax.rl.deal import deal_tails
from egrpo_jax.rl.learner import LearnerConfig
from egrpo_jax.rl.transitions import prompt_keys
from egrpo_jax.run.timing import peak_device_memory, peak_flops
from egrpo_jax.training.config import TrainConfig
from egrpo_jax.training.job import Job
from egrpo_jax.training.phases import make_phases

FLAGS = flags.FlagValues()
OUT = flags.DEFINE_string(
    "out", None, "The Markdown file to write into, with a heading '## On a GPU'.", flag_values=FLAGS
)
PARTS = flags.DEFINE_list("parts", ["forward", "diffusers", "lora", "full"], "What to measure.", flag_values=FLAGS)
TINY = flags.DEFINE_bool("tiny", False, "A model in miniature.", flag_values=FLAGS)
PART = flags.DEFINE_string("part", None, "Measure this part in this process, and print it as JSON.", flag_values=FLAGS)

ROUNDS = 2
TAIL_STEPS = 1
HEADING = "## On a GPU"
NOT_YET = "Nothing has been measured on a GPU yet.\n"


LORA = LoraConfig(FLUX.presets["flow_grpo"])


@dataclasses.dataclass(frozen=True)
class Size:
    """A model, the plan of an iteration with it, the adapters, and the side of the matrix product to compare with."""

    shape: Shape
    plan: EGrpo
    lora: LoraConfig = LORA
    matmul: int = 8192


DEV = Size(Shape(FluxConfig(), (45, 45), 512), EGrpo())
MINIATURE = Size(
    Shape(
        FluxConfig(
            in_channels=16, num_double_blocks=1, num_single_blocks=2, num_heads=2, head_dim=16, text_dim=24,
            pooled_dim=20, axes_dims=(4, 6, 6),
        ), (4, 4), 5,
    ), EGrpo(num_steps=4, group_size=3), dataclasses.replace(LORA, rank=2), matmul=64,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Row:
    """A measurement: the seconds of `flops` operations, and the peak of device memory so far, in bytes."""

    what: str
    seconds: float
    flops: float
    memory: float | None


def latents(shape: Shape, batch: int) -> np.ndarray:
    """Noise `[batch, N, D]`, float32."""
    return np.random.default_rng(0).standard_normal((batch, *shape.latents), np.float32)


def forward(size: Size) -> list[Row]:
    """Our passes."""
    shape = size.shape
    pipeline = random_pipeline(shape, "bfloat16", "bfloat16")
    params = pipeline.load(make_mesh(MeshConfig()))
    velocity = compiled(pipeline.velocity)
    rows = []
    for batch in (1, size.plan.group_size):
        given = jnp.asarray(latents(shape, batch)), jnp.full(batch, 0.5), jax.device_put(shape.conditioning(batch))
        run = functools.partial(lambda *inputs: jax.block_until_ready(velocity(params, *inputs)), *given)
        rows.append(timed(f"forward, batch {batch}", run, batch * shape.flops))
    return rows


def timed(what: str, run: Callable[[], object], flops: float, memory: Callable[[], Any] = peak_device_memory) -> Row:
    """The shortest of a few rounds."""
    seconds = float(alternate([run], ROUNDS).min())
    return Row(what, seconds, flops, memory())


def diffusers(size: Size) -> list[Row]:
    """Passes of diffusers' model, compiled on a GPU, with each attention that there is."""
    import torch

    cuda = torch.cuda.is_available()
    model = diffusers_model(size.shape.config, "cuda" if cuda else "cpu", torch.bfloat16)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.1)
    kernels = {"SDPA": "native"} | ({"FlashAttention 3": "_flash_3"} if has("flash_attn_interface") else {})
    rows = []
    for name, backend in kernels.items():
        model.set_attention_backend(backend)
        if cuda:
            torch.compiler.reset()
            model.compile_repeated_blocks(fullgraph=True, dynamic=False)
        for batch in (1, size.plan.group_size):
            run = _their_pass(size.shape, model, batch)
            memory = torch.cuda.max_memory_allocated if cuda else lambda: None
            rows.append(timed(f"diffusers, {name}, batch {batch}", run, batch * size.shape.flops, memory))
    return rows


def has(module: str) -> bool:
    """Whether `module` is installed."""
    return importlib.util.find_spec(module) is not None


def _their_pass(shape: Shape, model: Any, batch: int) -> Callable[[], None]:
    import torch

    device = next(model.parameters()).device
    given = lambda array: torch.from_numpy(array).to(device, torch.bfloat16)
    text = {name: given(array) for name, array in shape.conditioning(batch).items()}
    inputs = (given(latents(shape, batch)), text["text"], text["pooled"])
    time, guidance = (torch.full((batch,), value, device=device, dtype=torch.bfloat16) for value in (0.5, GUIDANCE))
    ids = token_ids(shape.text_tokens, shape.grid, str(device))

    @torch.no_grad()
    def run() -> None:
        model(*inputs, time, guidance=guidance, **ids, return_dict=False)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return run


def lora(size: Size) -> list[Row]:
    """Our engine's rollout and update of adapters."""
    with jax.set_mesh(make_mesh(MeshConfig())):
        job = short_job(size, size.lora, "bfloat16")
        phases, given = make_phases(job), jax.device_put(job.pipeline.encode(job.prompts))
        progress, frozen = first_progress(job, jax.sharding.get_mesh())
        inputs = job.plan.schedule(), given, keys()
        roll_out = lambda: jax.block_until_ready(phases.rollout(combine(state.params, frozen), *inputs))
        state = progress.state
        rows = [rollout_row("rollout, adapters", size, job, roll_out)]
        steps = roll_out().transitions
        advantage = jnp.asarray(np.random.default_rng(0).standard_normal(steps[0].log_prob.shape, np.float32))

        weights = np.ones(len(job.plan.branches), np.float32)

        def update() -> None:
            nonlocal state  # of which the update leaves nothing
            state, _ = jax.block_until_ready(
                phases.update(state, frozen, steps, advantage, weights, np.int32(0), given)
            )

        count = job.plan.training_passes
        return [*rows, timed(f"update, adapters: {count} states", update, 3 * count * size.shape.flops)]


def full(size: Size) -> list[Row]:
    """Our engine's rollout with all weights in float32."""
    with jax.set_mesh(make_mesh(MeshConfig())):
        job = short_job(size, None, "float32")
        phases, given = make_phases(job), jax.device_put(job.pipeline.encode(job.prompts))
        params = job.pipeline.load(jax.sharding.get_mesh())
        roll_out = lambda: jax.block_until_ready(phases.rollout(params, job.plan.schedule(), given, keys()))
        return [rollout_row("rollout, all weights", size, job, roll_out)]


def short_job(size: Size, adapters: LoraConfig | None, param_dtype: str) -> Job:
    """One prompt, and the plan with steps so long that every tail has `TAIL_STEPS` of its own; a group at once."""
    steps = size.plan.resolved_active_steps
    merges = tuple(size.plan.num_steps - TAIL_STEPS - step for step in steps)
    plan = dataclasses.replace(size.plan, entropy_threshold=None, merges=merges)
    pipeline = random_pipeline(size.shape, "bfloat16", param_dtype, "blocks", adapters)
    learner = LearnerConfig(micro_batch=1)
    return training_job(pipeline, TrainConfig(prompts_per_iteration=1, plan=plan, learner=learner))


def keys() -> jax.Array:
    """The key of the prompt."""
    return prompt_keys(jax.random.key(0), 0, 1)


def rollout_row(what: str, size: Size, job: Job, run: Callable[[], object]) -> Row:
    """Times a rollout and says of what passes it is made."""
    passes = len(deal_tails(job.plan, 1, 1).carried)
    what = f"{what}: {job.plan.num_steps} passes of 1, {passes} of {job.plan.group_size}"
    return timed(what, run, job.plan.rollout_passes * size.shape.flops)


def machine(size: Size) -> dict[str, Any]:
    """The device's name, its peak and what a matrix product reaches, and versions."""
    names = ("jax", "flax", "torch", "diffusers")
    versions = {name: importlib.metadata.version(name) for name in names if has(name)}
    card = jax.devices()[0].device_kind
    rate = matmul_rate(size.matmul)
    return {"card": card, "peak": peak_flops(card), "rate": rate, "versions": versions}


MEASURE = {"machine": machine, "forward": forward, "diffusers": diffusers, "lora": lora, "full": full}


def measured(part: str) -> Any:
    """What `part` gives, from a process of its own; a line that says why, if it gives nothing."""
    if part == "diffusers" and not (has("torch") and has("diffusers")):
        return "PyTorch or diffusers is not installed"
    command = [sys.executable, "-m", "benchmarks.gpu", f"--part={part}", f"--tiny={str(TINY.value).lower()}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    return f"exit code {done.returncode}" if done.returncode else json.loads(done.stdout.splitlines()[-1])


def table(about: dict[str, Any], rows: list[Row], notes: list[str]) -> str:
    """A section of Markdown, its heading the card's name."""
    share = lambda row, of: f"{row.flops / row.seconds / of:.0%}" if of else "unknown"
    memory = lambda row: f"{row.memory / 1e9:.1f}" if row.memory else "unknown"
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    rate = f"a large bfloat16 matrix product reaches {about['rate'] / 1e12:.3g} TFLOP/s"
    lines = [
        f"### {about['card']}",
        "",
        f"{datetime.date.today()}; {versions}; {rate}.",
        "",
        "| what | seconds | TFLOP/s | of the matrix product's | of the data sheet's | peak memory, GB |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = (
            row.what, f"{row.seconds:.3g}", f"{row.flops / row.seconds / 1e12:.3g}", share(row, about["rate"]),
            share(row, about["peak"]), memory(row),
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *notes, ""])


def whole_iteration(size: Size, rows: list[Row]) -> list[str]:
    """The seconds of a prompt's whole iteration at the plan of `size`, as far as `rows` tell."""
    by_kind = {row.what.split(":")[0]: row.seconds for row in rows}
    names = ("forward, batch 1", f"forward, batch {size.plan.group_size}", "update, adapters")
    if not all(name in by_kind for name in names):
        return []
    plan = size.plan.make_plan()
    anchor, tail, update = (by_kind[name] for name in names)
    rollout = plan.num_steps * anchor + len(deal_tails(plan, 1, 1).carried) * tail
    return [f"One prompt's iteration, computed from these: rollout {rollout:.4g} s, update of adapters {update:.3g} s."]


def write(path: Path, section: str) -> None:
    """Puts `section` under `HEADING`, in place of an earlier one with the same first line.

    Raises:
      ValueError: the file has no such heading.
    """
    before, heading, after = path.read_text().partition(HEADING)
    if not heading:
        raise ValueError(f"{path}: found no heading {HEADING!r}")
    first = re.escape(section.splitlines()[0])
    kept = re.sub(rf"^{first}\n.*?(?=^#|\Z)", "", after.replace(NOT_YET, ""), flags=re.DOTALL | re.MULTILINE)
    path.write_text(f"{before}{heading}{kept.rstrip()}\n\n{section}")


def main() -> None:
    """Measures one part here, or all in turn."""
    size = MINIATURE if TINY.value else DEV
    if PART.value:
        print(json.dumps(MEASURE[PART.value](size), default=dataclasses.asdict))
        return
    about = measured("machine")
    if isinstance(about, str):
        raise RuntimeError(f"the device does not answer: {about}")
    found = {part: measured(part) for part in PARTS.value}
    notes = [f"`{part}` was not measured: {why}." for part, why in found.items() if isinstance(why, str)]
    rows = [Row(**row) for part in found.values() if not isinstance(part, str) for row in part]
    section = table(about, rows, notes + whole_iteration(size, rows))
    print(section)
    if OUT.value:
        write(Path(OUT.value), section)
    if any(str(why).startswith("exit code") for why in found.values()):
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main, FLAGS)
