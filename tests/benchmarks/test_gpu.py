"""benchmarks/gpu.py in miniature, without PyTorch."""

import pytest

from benchmarks import gpu

ABOUT = {"card": "Some card", "peak": 4e12, "rate": 2e12, "versions": {"jax": "1.2"}}


@pytest.mark.parametrize(
    "part", ["forward", *(pytest.param(part, marks=pytest.mark.slow) for part in ("lora", "full"))]
)
def test_every_part_of_ours_is_measured(part):
    size = gpu.MINIATURE
    rows = gpu.MEASURE[part](size)
    assert all(row.seconds > 0 for row in rows)
    passes = {
        "forward": [("forward, batch 1", 1), ("forward, batch 3", 3)],
        "lora": [("rollout, adapters: 4 passes of 1, 2 of 3", 4 + 2 * 3), ("update, adapters: 2 states", 3 * 2)],
        "full": [("rollout, all weights: 4 passes of 1, 2 of 3", 4 + 2 * 3)],
    }
    assert [(row.what, row.flops / size.shape.flops) for row in rows] == passes[part]


def test_the_matrix_product_and_the_machine_are_known():
    about = gpu.machine(gpu.MINIATURE)
    assert about["rate"] > 0
    assert {"jax", "flax"} <= about["versions"].keys()


def test_a_table_has_the_shares_of_what_the_card_can_do():
    section = gpu.table(ABOUT, [gpu.Row("forward", 0.5, 5e11, 3e9), gpu.Row("other", 1.0, 1e12, None)], ["A note."])
    assert section.startswith("### Some card\n")
    assert "| forward | 0.5 | 1 | 50% | 25% | 3.0 |" in section
    assert "| other | 1 | 1 | 50% | 25% | unknown |" in section
    assert section.endswith("\nA note.\n")


def test_a_whole_iteration_is_computed_from_its_parts():
    rows = [gpu.Row(what, seconds, 1.0, None) for what, seconds in (
        ("forward, batch 1", 1.0), ("forward, batch 12", 10.0), ("update, adapters: 8 states", 5.0),
    )]  # fmt: skip
    (line,) = gpu.whole_iteration(gpu.DEV, rows)
    assert "rollout 846 s, update of adapters 5 s" in line  # 16 passes of 1; 996 tail steps on 12 slots are 83
    assert gpu.whole_iteration(gpu.DEV, rows[:2]) == []


def test_a_section_takes_the_place_of_the_same_cards(tmp_path):
    path = tmp_path / "speed.md"
    path.write_text(f"# Speed\n\n{gpu.HEADING}\n\n{gpu.NOT_YET}")
    gpu.write(path, "### A\n\nold\n")
    gpu.write(path, "### B\n\nother\n")
    gpu.write(path, "### A\n\nnew\n")
    assert path.read_text() == f"# Speed\n\n{gpu.HEADING}\n\n### B\n\nother\n\n### A\n\nnew\n"


def test_a_file_without_the_heading_is_left_alone(tmp_path):
    (tmp_path / "x.md").write_text("# Speed\n")
    with pytest.raises(ValueError, match="found no heading"):
        gpu.write(tmp_path / "x.md", "### A\n")
    assert (tmp_path / "x.md").read_text() == "# Speed\n"
