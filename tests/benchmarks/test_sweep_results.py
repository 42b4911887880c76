"""benchmarks/sweep_results.py on planted results: rates, intervals, verdicts, equal time."""

import numpy as np
import pytest
import scipy.stats

from benchmarks import compare_algorithms, sweep_results
from benchmarks.sweep_results import REWARDS, Run
from tests import programs


def run(gain, iterations=4, seconds=40.0):
    """Rises to `gain` in the first half, then stays."""
    rows = [(0, 0.0), (iterations // 2, gain), (iterations, gain)]
    return {
        "evaluations": [
            {"iteration": at, "seconds": seconds * at / iterations, **dict.fromkeys(REWARDS, 0.4 + value)}
            for at, value in rows
        ],
        "diversity": -gain,
    }


def planted(name, gains, tuned=(("1e-4", 0.1), ("2e-4", 0.2)), **changes):
    tunes = {Run(name, "tune", rate, 100).name: run(gain, **changes) for rate, gain in tuned}
    return tunes | {Run(name, "final", "2e-4", seed).name: run(gain, **changes) for seed, gain in enumerate(gains)}


BASE = (0.10, 0.11, 0.09, 0.10, 0.10)
RESULTS = (
    planted("base", BASE)
    | planted("better", [gain + 0.05 for gain in BASE], iterations=8, seconds=80.0)
    | planted("alike", (0.05, 0.16, 0.08, 0.12, 0.10), seconds=20.0)
    | planted("worse", [gain - 0.05 for gain in BASE])
    | planted("untuned", ())
)
ENTRIES = sweep_results.entries(RESULTS, ("base", "better", "alike", "worse", "untuned", "absent"))


def row(table, name):
    line = next(line for line in table.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.split("|")[1:-1]]


def test_the_best_rate_counts_and_entries_without_runs_do_not():
    assert [entry.name for entry in ENTRIES] == ["base", "better", "alike", "worse"]
    assert {entry.rate for entry in ENTRIES} == {"2e-4"}
    other = RESULTS | {Run("base", "final", "1e-4", 0).name: run(9.0)}
    assert len(sweep_results.entries(other, ("base",))[0].runs) == 5
    assert sweep_results.best_rate(planted("x", (), tuned=(("1e-4", 0.3), ("2e-4", 0.2))), "x") == "1e-4"
    assert [one.rate for one in sweep_results.entries(planted("x", BASE, tuned=()), ("x",))] == ["2e-4"]


@pytest.mark.parametrize(
    ("gains", "expected"), [((0.1, 0.2, 0.3), "8e-4"), ((0.3, 0.2, 0.1), "5e-5"), ((0.1, 0.3, 0.2), None)]
)
def test_rates_go_on_where_the_best_is_at_an_end(gains, expected):
    tuned = tuple(zip(("1e-4", "2e-4", "4e-4"), gains, strict=True))
    assert sweep_results.next_rate(planted("x", (), tuned=tuned), "x") == expected
    assert sweep_results.rate_name(1.6e-3) == "1.6e-3"


def test_intervals_are_students():
    half = np.std(BASE, ddof=1) / np.sqrt(5) * 2.776  # t of four degrees of freedom
    assert sweep_results.interval(dict(enumerate(BASE))) == f"+0.1000 ± {half:.4f}"


def test_differences_are_of_the_seeds_that_both_have():
    others = {0: 0.10, 1: 0.20, 3: 0.40, 4: 0.90}
    gains = {0: 0.15, 1: 0.24, 2: 9.0, 3: 0.46}
    expected = scipy.stats.ttest_rel([0.15, 0.24, 0.46], [0.10, 0.20, 0.40]).confidence_interval()
    half = (expected.high - expected.low) / 2
    assert sweep_results.difference(gains, others) == f"+0.0500 ± {half:.4f}, wins"
    assert sweep_results.difference(others, gains) == f"-0.0500 ± {half:.4f}, loses"
    assert sweep_results.difference(others, others) == "+0.0000 ± 0.0000, ties"
    assert sweep_results.difference({0: 0.1, 1: 0.3}, {0: 0.2, 1: 0.1}).endswith(", ties")


def test_the_table_says_who_wins():
    table = sweep_results.table(ENTRIES)
    names = [line.split(" | ")[0].strip("| ") for line in table.splitlines()[2:]]
    assert names == ["better", "alike", "base", "worse"]
    assert row(table, "better")[1:5] == ["2e-4", "8", "2.00", "5"]
    assert [row(table, name)[-1].split(", ")[-1] for name in ("better", "alike", "worse")] == ["wins", "ties", "loses"]
    assert row(table, "base")[-1] == ""
    assert row(table, "worse")[8] == sweep_results.interval({seed: 0.05 - gain for seed, gain in enumerate(BASE)})


def test_at_equal_time_the_slow_have_trained_less():
    """ "alike" is the quickest, with 20 seconds: "better" is at a quarter of its run then, halfway to its gain."""
    table = sweep_results.table_of_equal_time(ENTRIES)
    assert row(table, "better")[1] == "2.0"
    assert row(table, "better")[2].startswith("+0.0750 ± ")
    assert row(table, "base")[2].startswith("+0.1000 ± ")
    assert row(table, "better")[-1].endswith(", loses")


def test_a_page_is_filled_between_its_marks():
    page = "a\n<!-- one -->\nold\nolder\n<!-- end -->\nb\n<!-- two -->\nkept\n<!-- end -->\n"
    assert sweep_results.fill(page, "one", r"| \1 |") == page.replace("old\nolder", r"| \1 |")
    assert sweep_results.fill(page, "three", "new") == page


@pytest.mark.parametrize("draw", [sweep_results.plot, sweep_results.plot_gains])
def test_figures_are_drawn(draw, tmp_path):
    draw(ENTRIES, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


@pytest.mark.parametrize("name", sorted(path.stem for path in (programs.ROOT / "configs" / "sweeps").glob("*.py")))
def test_the_page_has_the_tables_of_the_results(name):
    """docs/results/algorithms.md, of the runs in docs/results/<sweep>.json."""
    sweep, file = compare_algorithms.load_sweep(name), compare_algorithms.RESULTS / f"{name}.json"
    if not file.exists():
        pytest.skip("has not been run")
    found = sweep_results.entries(compare_algorithms.load_results(sweep, file), sweep.entries)
    page = (compare_algorithms.RESULTS / "algorithms.md").read_text()
    assert sweep_results.table(found) in page
    assert sweep_results.table_of_equal_time(found) in page
