"""A Markdown table of several finished runs of one config: `python benchmarks/summarise_runs.py runs/emoji_*`.

For every reward: its mean on the evaluation prompts before and after each run, the paired change with its 95 % interval
over prompts, and, last, the mean change over the runs with its 95 % interval over them (Student's t).
"""

import argparse
from pathlib import Path

import scipy.stats

from egrpo_jax.run.metrics import read_metrics


def main(workdirs: list[str]) -> None:
    """Prints the table."""
    runs = [read_metrics(Path(workdir) / "metrics.jsonl") for workdir in workdirs]
    rewards = [name.split("/")[1] for name in runs[0][-1] if name.startswith("eval/") and name.endswith("/change")]
    print("| run | iterations | " + " | ".join(rewards) + " |")
    print("|---" * (len(rewards) + 2) + "|")
    changes = {reward: [] for reward in rewards}
    for workdir, lines in zip(workdirs, runs, strict=True):
        first, last = lines[0], lines[-1]
        cells = []
        for reward in rewards:
            before, after = first[f"eval/{reward}/mean"], last[f"eval/{reward}/mean"]
            change, width = last[f"eval/{reward}/change"], last[f"eval/{reward}/change_ci95"]
            changes[reward].append(change)
            cells.append(f"{before:.3f} → {after:.3f} ({change:+.3f} ± {width:.3f})")
        print(f"| {Path(workdir).name} | {last['iteration']:.0f} | " + " | ".join(cells) + " |")
    if len(runs) > 1:
        intervals = [scipy.stats.ttest_1samp(changes[reward], 0.0).confidence_interval() for reward in rewards]
        cells = [f"**{(low + high) / 2:+.3f} ± {(high - low) / 2:.3f}**" for low, high in intervals]
        print(f"| mean of {len(runs)} | | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workdirs", nargs="+")
    main(parser.parse_args().workdirs)
