"""Checks what the README promises of its first command: `python -m tests.check_quickstart WORKDIR`."""

import sys
from pathlib import Path

from egrpo_jax.run.metrics import read_metrics


def main(workdir):
    first, *_, last = read_metrics(Path(workdir) / "metrics.jsonl")
    change = {name: last[f"eval/{name}/change"] for name in ("emoji", "emoji_judge", "emoji_judge_r1")}
    print("change on the held-out prompts:", {name: round(value, 4) for name, value in change.items()})
    assert 0.30 <= first["eval/emoji_judge_r1/mean"] <= 0.45, first["eval/emoji_judge_r1/mean"]
    assert change["emoji"] >= 0.035
    assert change["emoji_judge"] >= 0.015
    assert change["emoji_judge"] > last["eval/emoji_judge/change_ci95"]
    assert change["emoji_judge_r1"] > 0
    for name in ("before_after.png", "reward_curve.png", "entropy.png"):
        assert (Path(workdir) / name).stat().st_size > 10_000, name


if __name__ == "__main__":
    main(sys.argv[1])
