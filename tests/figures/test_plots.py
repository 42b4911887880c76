import math

import pytest
from PIL import Image

from egrpo_jax.common.errors import UserError
from egrpo_jax.figures import plots
from egrpo_jax.flow.entropy import exp_entropy
from egrpo_jax.flow.grid import shifted_times
from egrpo_jax.flow.process import FlowSde


@pytest.fixture
def figures(monkeypatch):
    """The figures that were saved, to look into."""
    saved, save = [], plots.save_figure

    def keep(figure, path):
        saved.append(figure)
        save(figure, path)

    monkeypatch.setattr(plots, "save_figure", keep)
    return saved


def metrics(count):
    lines = [{"iteration": i, "reward/hps/mean": float(i % 2), "reward/hps/std": 0.1} for i in range(1, count + 1)]
    lines[0] |= {"eval/hps/mean": 0.5, "eval/clip/mean": 0.1}
    lines[-1] |= {
        "eval/hps/mean": 0.7,
        "eval/hps/change": 0.2,
        "eval/hps/change_ci95": 0.05,
        "eval/clip/mean": math.nan,
    }
    return lines


def size(path):
    with Image.open(path) as image:
        return image.size


def test_reward_curve(tmp_path, figures):
    plots.reward_curve(metrics(100), ["hps"], ["clip"], tmp_path / "curve.png")
    train, heldout = figures[0].axes
    assert train.get_title() == "hps (train)"
    assert heldout.get_title() == "clip (held out)"
    raw, smooth = train.lines[:2]
    assert list(raw.get_ydata()) == [float(i % 2) for i in range(1, 101)]
    assert min(smooth.get_ydata()) > 0.3
    assert max(smooth.get_ydata()) < 0.7
    (bars,) = train.containers
    low, high = bars.lines[2][0].get_segments()[1][:, 1]
    assert (low, high) == pytest.approx((0.65, 0.75))
    assert {axes.get_xlabel() for axes in figures[0].axes} == {"iteration"}
    assert min(size(tmp_path / "curve.png")) > 400


@pytest.mark.parametrize("lines", [[], metrics(1), metrics(2)])
def test_reward_curve_of_a_short_run(tmp_path, lines):
    plots.reward_curve(lines, ["hps"], ["clip", "other"], tmp_path / "curve.png")
    assert size(tmp_path / "curve.png")[0] > 800


@pytest.mark.parametrize("threshold", [2.2, None])
def test_entropy_plot(tmp_path, figures, threshold):
    times = shifted_times(6, 3.0)
    plots.entropy_plot(times, FlowSde(0.7), [0, 2], [1, 3], threshold, tmp_path / "entropy.png")
    (axes,) = figures[0].axes
    heights = [[bar.get_height() for bar in bars] for bars in axes.containers]
    assert heights[0] == [exp_entropy(FlowSde(0.7), times, step, 1) for step in range(6)]
    assert heights[1] == [exp_entropy(FlowSde(0.7), times, 0, 1), exp_entropy(FlowSde(0.7), times, 2, 3)]
    assert [text.get_text() for text in axes.texts] == ["1", "3"]
    assert [line.get_ydata()[0] for line in axes.lines] == ([] if threshold is None else [threshold])
    assert size(tmp_path / "entropy.png")[0] > 800


def test_a_path_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        plots.reward_curve([], ["hps"], [], tmp_path / "file" / "curve.png")
