import numpy as np
import pytest
from PIL import Image

from egrpo_jax.common.errors import UserError
from egrpo_jax.figures.schedule import Fan, Offshoot, Tree, schedule_figure

TIMES = (1.0, 0.9, 0.75, 0.5, 0.0)
FAN = Fan((Offshoot(0, 1, ((1, 2, 3, 4),)), Offshoot(1, 3, ((3, 4),))), group_size=5)
TREE = Tree(1, (1, 2, 3), (2, 2), (1.0, 0.5), (3, 4))


def drawn(path, *panels):
    schedule_figure(TIMES, {f"panel {number}": panel for number, panel in enumerate(panels)}, path)
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def red(pixels):
    return (pixels[..., 0] > 180) & (pixels[..., 1] < 120) & (pixels[..., 2] < 120)


def blue(pixels):
    return (pixels[..., 2] > 150) & (pixels[..., 0] < 100)


def test_random_steps_lie_where_they_are(tmp_path):
    pixels = drawn(tmp_path / "fan.png", FAN)
    columns = np.flatnonzero(red(pixels).any(0))
    scale = pixels.shape[1] / 1.08 / 4  # pixels of a grid step; the axis has margins of 2 % and 6 %
    assert columns.min() == pytest.approx(0.08 * scale, abs=12)
    assert columns.max() == pytest.approx(3.08 * scale, abs=12)
    assert np.flatnonzero(blue(pixels).any(0)).min() == pytest.approx(1.08 * scale, abs=12)
    early = Fan((Offshoot(0, 1, ((1, 2, 3, 4),)),), group_size=5)
    assert np.flatnonzero(red(drawn(tmp_path / "early.png", early)).any(0)).max() == pytest.approx(1.08 * scale, abs=12)


def test_leaves_of_a_tree_are_tails(tmp_path):
    pixels = drawn(tmp_path / "tree.png", TREE)
    column = blue(pixels)[:, round(3.55 / 4 * pixels.shape[1] / 1.08)]
    assert np.diff(np.concatenate([[0], column.astype(int)])).tolist().count(1) == 4


def test_steps_that_do_not_train_are_paler_and_have_no_dot(tmp_path):
    trained, pruned = (
        red(drawn(tmp_path / f"{share}.png", TREE._replace(trained=(1.0, share)))).sum() for share in (1.0, 0.0)
    )
    assert pruned < 0.7 * trained


def test_panels_are_below_one_another(tmp_path):
    one, two = drawn(tmp_path / "one.png", TREE), drawn(tmp_path / "two.png", TREE, FAN)
    assert one.shape[1] == two.shape[1]
    assert two.shape[0] > 1.5 * one.shape[0]


def test_a_path_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError):
        schedule_figure(TIMES, {"fan": FAN}, tmp_path / "file" / "fan.png")
