"""What part of an E-GRPO iteration is decoding and scoring.

By analytic operations, of FLUX.1-dev at the paper's setting, with HPSv2.1 and ImageReward:

    python benchmarks/iteration_share.py --pixels=720

As measured, of a finished run, from the seconds that it wrote down for each phase:

    python benchmarks/iteration_share.py --workdir=runs/emoji
"""

from __future__ import annotations

from pathlib import Path

from absl import flags

from egrpo_jax import cli
from egrpo_jax.models import blip, clip, flux, vae
from egrpo_jax.rewards.imagereward import TEXT_TOKENS as WORDS
from egrpo_jax.rl.algorithms.egrpo import EGrpo
from egrpo_jax.run.metrics import read_metrics

FLAGS = flags.FlagValues()
PIXELS = flags.DEFINE_integer(
    "pixels", 720, "Height and width of the square images, a multiple of 16.", flag_values=FLAGS
)
TEXT_TOKENS = flags.DEFINE_integer("text_tokens", 512, "Text tokens of the flow model.", flag_values=FLAGS)
WORKDIR = flags.DEFINE_string("workdir", None, "A run whose seconds are shown instead.", flag_values=FLAGS)

PHASES = ("rollout", "decode", "reward", "update")


def analytic() -> dict[str, float]:
    """Operations of each phase, for one prompt, at the paper's setting."""
    plan = EGrpo().make_plan()
    velocity = flux.forward_flops(flux.FluxConfig(), (PIXELS.value // 16) ** 2, TEXT_TOKENS.value)
    side = PIXELS.value // vae.VaeConfig().stride
    scores = clip.image_flops(clip.ClipConfig()) + blip.forward_flops(blip.BlipConfig(), WORDS)
    return {
        "rollout": plan.rollout_passes * velocity,
        "decode": plan.decodes * vae.decoder_flops(vae.VaeConfig(), side, side),
        "reward": plan.decodes * scores,
        "update": 3 * plan.training_passes * velocity,
    }


def measured(workdir: str) -> dict[str, float]:
    """Mean seconds of each phase, without the first iteration, which compiles."""
    lines = [line for line in read_metrics(Path(workdir) / "metrics.jsonl") if "seconds/rollout" in line][1:]
    return {phase: sum(line[f"seconds/{phase}"] for line in lines) / len(lines) for phase in PHASES}


def main() -> None:
    """Prints the phases and their shares."""
    phases = analytic() if WORKDIR.value is None else measured(WORKDIR.value)
    unit, scale = ("TFLOP", 1e12) if WORKDIR.value is None else ("s", 1)
    total = sum(phases.values())
    for name, amount in phases.items():
        print(f"{name:8} {amount / scale:12.2f} {unit}  {amount / total:6.2%}")
    print(f"decode and reward together: {(phases['decode'] + phases['reward']) / total:.2%}")


if __name__ == "__main__":
    cli.run(main, FLAGS)
