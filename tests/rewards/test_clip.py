"""Scores under CLIPs from files laid out as the published ones, against open_clip and transformers (golden files)."""

import functools
import json
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from egrpo_jax.common.errors import UserError
from egrpo_jax.common.offload import HOST
from egrpo_jax.models.clip import Clip
from egrpo_jax.parallel.mesh import MeshConfig, make_mesh
from egrpo_jax.rewards import clip, clip_files
from egrpo_jax.rewards.clip_files import clip_shapes, hps_version, load_clip, load_hps
from egrpo_jax.rewards.config import AestheticConfig, ClipScoreConfig, HpsConfig, PickScoreConfig, ScorersConfig
from egrpo_jax.rewards.registry import load_reward
from egrpo_jax.weights.layout import published_shapes
from egrpo_jax.weights.published.clip import clip_layout
from egrpo_jax.weights.published.open_clip import open_clip_layout
from tests.oracle import clip_model, open_clip
from tests.oracle.scored_images import TEXTS, images, prompts
from tests.oracle.tokenizers import write_clip
from tests.torch_files import write_checkpoint

MESH = make_mesh(MeshConfig())


@functools.cache
def golden(oracle):
    with np.load(oracle.GOLDEN) as file:
        return {name: file[name] for name in file.files}


def published_tensors(case):
    """The state dict of a case, float32."""
    layout = open_clip_layout if isinstance(case, open_clip.Case) else clip_layout
    return open_clip.tensors(published_shapes(layout(case.config), clip_shapes(Clip(case.config))))


def write_open_clip(folder, case):
    """As laion publishes: a flat state dict in float32."""
    (folder / "open_clip_config.json").write_text(json.dumps(case.published))
    write_checkpoint(folder / "open_clip_pytorch_model.bin", published_tensors(case))
    write_clip(folder)


def write_hps(path, case, root="HPS_v2.1_compressed"):
    """As HPSv2 publishes: the state dict of open_clip in float16, under a key, other things beside it."""
    half = {name: np.float16(array) for name, array in published_tensors(case).items()}
    write_checkpoint(path, half, key="state_dict", root=root, epoch=1)


def write_transformers(folder, case):
    """As PickScore is published: with the numbers of the positions, which are no parameters."""
    (folder / "config.json").write_text(json.dumps(case.published))
    numbers = {
        "text_model.embeddings.position_ids": np.arange(77)[None],
        "vision_model.embeddings.position_ids": np.arange(case.config.vision.tokens)[None],
    }
    save_file(published_tensors(case) | numbers, folder / "model.safetensors", {"format": "pt"})
    write_clip(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder for each case, by its oracle and its name, made when it is first asked for."""

    @functools.cache
    def made(oracle, name):
        folder, case = tmp_path_factory.mktemp(name), oracle.CASES[name]
        (write_open_clip if oracle is open_clip else write_transformers)(folder, case)
        if oracle is open_clip:
            write_hps(folder / "HPS_v2.1_compressed.pt", case)
            write_checkpoint(folder / "aesthetic.pth", open_clip.head_tensors(case.dim))
        return folder

    return made


def scorers(folder, **changes):
    """All scorers from one folder."""
    return ScorersConfig(
        hps=HpsConfig(str(folder), str(folder)),
        clip_score=ClipScoreConfig(str(folder)),
        pickscore=PickScoreConfig(str(folder)),
        aesthetic=AestheticConfig(str(folder / "aesthetic.pth"), str(folder)),
        **{"batch": 2, **changes},
    )


@pytest.fixture(scope="module")
def reward_of(folders):
    """A reward from the files of a case."""

    @functools.cache
    def load(reward, oracle, name):
        config = scorers(folders(oracle, name))
        if reward == "hpsv2.1":
            return clip.hpsv2_1(config, MESH, oracle.CASES[name].config)
        return getattr(clip, reward)(config, MESH)

    return load


def pixels(size):
    return images(size) / np.float32(255)


PARITY = [  # reward, oracle, case, name of the golden scores, scale of a cosine
    ("hpsv2.1", open_clip, "gelu", "hps", 1),
    ("clip_score", open_clip, "heads_of_80", "clip", 1),
    ("pickscore", clip_model, "pickscore", "scores", 100),
    ("aesthetic", open_clip, "quick_gelu", "marks", 1),
]
OTHER_SIZES = [
    ("hpsv2.1", open_clip, "heads_of_80", "hps", 1),
    ("clip_score", open_clip, "quick_gelu", "clip", 1),
    ("pickscore", clip_model, "quick_gelu", "scores", 100),
]


@pytest.mark.parametrize(("reward", "oracle", "case"), [(reward, oracle, case) for reward, oracle, case, *_ in PARITY])
def test_a_scorer_that_rests_on_the_host_gives_the_same_scores(folders, reward_of, reward, oracle, case):
    config = scorers(folders(oracle, case), offload=True)
    make = (
        functools.partial(clip.hpsv2_1, sizes=oracle.CASES[case].config)
        if reward == "hpsv2.1"
        else getattr(clip, reward)
    )
    before = {id(array) for array in jax.live_arrays()}
    resting = make(config, MESH)
    new = [array for array in jax.live_arrays() if id(array) not in before and array.ndim > 1]
    head = {"device"} if reward == "aesthetic" else set()
    assert {array.sharding.memory_kind for array in new if array.size > 2000} == {HOST} | head
    given = pixels("wide"), prompts("wide")
    np.testing.assert_array_equal(resting(*given), reward_of(reward, oracle, case)(*given))


@pytest.mark.parametrize("size", ["square", "wide", "tall", "odd"])
@pytest.mark.parametrize(("reward", "oracle", "case", "scores", "scale"), PARITY)
def test_parity_from_pixels_and_prompts_to_scores(reward_of, reward, oracle, case, scores, scale, size):
    got = reward_of(reward, oracle, case)(pixels(size), prompts(size))
    assert got.dtype == np.float32
    np.testing.assert_allclose(got / scale, golden(oracle)[f"{case}/{scores}_{size}"] / scale, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("reward", "oracle", "case", "scores", "scale"), OTHER_SIZES)
def test_parity_of_other_models(reward_of, reward, oracle, case, scores, scale):
    got = reward_of(reward, oracle, case)(pixels("wide"), prompts("wide"))
    np.testing.assert_allclose(got / scale, golden(oracle)[f"{case}/{scores}_wide"] / scale, rtol=0, atol=1e-5)


def test_the_published_ways_of_resizing_are_told_apart():
    """By more than parity allows: HPSv2 resizes tensors, and the two crops differ where the leftover is odd."""
    scores = golden(open_clip)
    for case in open_clip.CASES:
        assert np.abs(scores[f"{case}/hps_wide"] - scores[f"{case}/clip_wide"]).min() > 5e-5


def test_clip_score_of_a_folder_of_transformers(reward_of):
    """The same model and images as PickScore's, the cosine alone."""
    got = reward_of("clip_score", clip_model, "pickscore")(pixels("wide"), prompts("wide"))
    logit_scale = np.exp(open_clip.LOGIT_SCALE.astype(np.float16).astype(np.float32))
    np.testing.assert_allclose(got, golden(clip_model)["pickscore/scores_wide"] / logit_scale, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("reward", "oracle", "case", "vectors"),
    [("hpsv2.1", open_clip, "gelu", "hps_images"), ("pickscore", clip_model, "pickscore", "images")],
)
def test_vectors_of_images_are_the_published_ones(reward_of, reward, oracle, case, vectors):
    got = reward_of(reward, oracle, case).encode_images(pixels("wide"))
    np.testing.assert_allclose(got, golden(oracle)[f"{case}/{vectors}_wide"], atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(got, axis=-1), 1, atol=1e-6)


@pytest.mark.parametrize(("oracle", "case"), [(open_clip, "quick_gelu"), (clip_model, "quick_gelu")])
def test_vectors_of_texts_are_the_published_ones(folders, oracle, case):
    """Texts that open_clip mends and transformers does not; long, empty and of other scripts."""
    loaded = load_clip(str(folders(oracle, case)), "float32", MESH)
    encode = jax.jit(lambda ids: loaded.model.apply({"params": loaded.params}, ids, method="encode_text"))
    np.testing.assert_allclose(encode(loaded.tokenize(TEXTS)), golden(oracle)[f"{case}/texts"], atol=1e-5)


def test_a_group_of_images_of_one_prompt_and_none_of_another(reward_of):
    """Each image's score is its own, whatever stands beside it; one that is nan has none."""
    reward = reward_of("hpsv2.1", open_clip, "gelu")
    batch, texts = np.tile(pixels("wide"), (2, 1, 1, 1))[:3], ["a cat", "a cat", "two dogs"]
    scores = np.asarray(reward(batch, texts))
    np.testing.assert_allclose(reward(batch[::-1], texts[::-1])[::-1], scores, atol=1e-6)
    assert len(np.unique(scores.round(4))) == 3
    batch[1, 5, 7] = np.nan
    np.testing.assert_array_equal(np.isnan(reward(batch, texts)), [False, True, False])
    with pytest.raises(AssertionError):
        reward(batch, texts[:2])


def test_bfloat16(folders):
    """Near float32, with parameters of half the size, but for the scale, whose rounding exp would magnify."""
    folder = folders(open_clip, "gelu")
    loaded = load_clip(str(folder), "bfloat16", MESH)
    assert loaded.params["logit_scale"].dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded.params["vision"])} == {jnp.dtype(jnp.bfloat16)}
    vectors = clip.ImageFeatures(loaded, 2, MESH)(pixels("wide"))
    assert vectors.dtype == jnp.float32
    assert 1e-4 < np.abs(vectors - golden(open_clip)["gelu/clip_images_wide"]).max() < 0.02


def vectors_of(texts):
    """A stand-in for an encoder: the length of a text, twice."""
    return np.array([[len(text)] * 2 for text in texts], np.float32)


def test_a_text_is_encoded_once_and_the_last_asked_for_are_kept():
    asked = []
    texts = clip.TextFeatures(lambda texts: (asked.append(texts), vectors_of(texts))[1], kept=3)
    np.testing.assert_array_equal(texts(["a", "bb", "a", "a"])[:, 0], [1, 2, 1, 1])
    assert asked == [["a", "bb", *[""] * 6]]
    texts(["ccc", "dddd"])  # "bb" has been asked for last of the first two
    assert len(asked) == 2
    texts(["bb", "ccc", "dddd"])
    assert len(asked) == 3 or asked[-1][0] == "ccc"
    texts(["a"])
    assert asked[-1][0] == "a"


def test_more_texts_at_once_than_are_kept():
    asked = []
    texts = clip.TextFeatures(lambda texts: (asked.append(len(texts)), vectors_of(texts))[1], kept=3)
    many = ["x" * length for length in range(20)]
    np.testing.assert_array_equal(texts(many)[:, 0], range(20))
    assert asked == [8, 8, 8]
    np.testing.assert_array_equal(texts(many[17:])[:, 1], range(17, 20))
    assert asked == [8, 8, 8]


@pytest.mark.parametrize(
    ("name", "root", "version"),
    [
        ("HPS_v2.1_compressed.pt", "archive", "2.1"),
        ("HPS_v2_compressed.pt", "archive", "2.0"),
        ("renamed.pt", "HPS_v2_compressed", "2.0"),
        ("renamed.pt", "HPS_v2.1_compressed", "2.1"),
        ("HPS_v2.1_compressed.pt", "HPS_v2_compressed", "2.0"),
        ("mine.pt", "archive", None),
    ],
)
def test_versions_of_hps_by_the_names_of_their_files(tmp_path, name, root, version):
    write_checkpoint(tmp_path / name, {"logit_scale": np.float16(4.6)}, root=root)
    assert hps_version(tmp_path / name) == version


@pytest.mark.parametrize(("size", "version"), [(1_972_484_501, "2.0"), (1_972_490_005, "2.1")])
def test_versions_of_hps_by_the_sizes_of_the_published_files(tmp_path, size, version):
    with open(tmp_path / "renamed.pt", "wb") as file:
        file.truncate(size)  # takes no space
    assert hps_version(tmp_path / "renamed.pt") == version


def test_a_file_of_the_other_version_is_warned_of_in_a_line(tmp_path, capsys):
    case = open_clip.CASES["gelu"]
    write_clip(tmp_path)
    write_hps(tmp_path / "hps.pt", case, root="HPS_v2_compressed")
    config = ScorersConfig(hps=HpsConfig(str(tmp_path / "hps.pt"), str(tmp_path)))
    clip.hpsv2_1(config, MESH, case.config)
    warning = capsys.readouterr().err
    assert warning.startswith("warning: the reward 'hpsv2.1' has in ")
    assert "a file of HPSv2.0, and scores of the two are not comparable; use the reward 'hpsv2.0'" in warning
    assert warning.count("\n") == 1
    clip.hpsv2_0(config, MESH, case.config)
    assert not capsys.readouterr().err
    write_hps(tmp_path / "hps.pt", case)
    clip.hpsv2_0(config, MESH, case.config)
    assert "'hpsv2.0' has in " in capsys.readouterr().err


def test_hps_from_safetensors_is_the_same(folders, tmp_path):
    case, folder = open_clip.CASES["gelu"], str(folders(open_clip, "gelu"))
    half = {name: np.asarray(array, np.float16) for name, array in published_tensors(case).items()}
    save_file(half, tmp_path / "HPS_v2.1_compressed.safetensors")
    loaded, version = load_hps(str(tmp_path), folder, "2.1", "float32", MESH, case.config)
    assert version == "2.1"
    assert loaded.preprocess.arithmetic == "torch"
    expected, _ = load_hps(folder, folder, "2.1", "float32", MESH, case.config)
    chex.assert_trees_all_equal(loaded.params, expected.params)


def test_a_folder_without_weights_names_those_it_should_have(folders, tmp_path):
    folder = folders(open_clip, "gelu")
    with pytest.raises(UserError, match=r"has none of HPS_v2_compressed.pt, HPS_v2_compressed.safetensors; give the"):
        load_reward("hpsv2.0", scorers(folder), MESH)
    (tmp_path / "config.json").write_text(json.dumps(clip_model.CASES["pickscore"].published))
    with pytest.raises(UserError, match=r"has none of model.safetensors, pytorch_model.bin; give the folder"):
        load_reward("pickscore", scorers(tmp_path), MESH)


def test_a_text_encoder_that_reads_elsewhere_than_at_the_end(folders):
    """It would give all texts one vector."""
    file = folders(clip_model, "pickscore") / "config.json"
    published = clip_model.CASES["pickscore"].published
    published["text_config"]["eos_token_id"] = 5
    file.write_text(json.dumps(published))
    with pytest.raises(UserError, match=r"config\.json: text_config\.eos_token_id is 5; must be \d+, with which its"):
        load_reward("pickscore", scorers(file.parent), MESH)


def test_from_the_hub_only_what_is_used_is_downloaded(folders, tmp_path, monkeypatch):
    """Of a repository like laion's, that has the same weights in four files."""
    folder, fetched = folders(open_clip, "gelu"), []
    weights = folder / "open_clip_pytorch_model.bin"
    repository = {path.name: path for path in folder.iterdir() if path.suffix in (".json", ".txt", ".bin")}
    repository |= {"pytorch_model.bin": weights, "model.safetensors": weights}

    def download(_, patterns):
        for name in patterns:
            if name in repository and not (tmp_path / name).exists():
                fetched.append(name)
                (tmp_path / name).symlink_to(repository[name])
        return tmp_path

    monkeypatch.setattr(clip_files, "resolve", download)
    loaded = load_clip("laion/some-clip", "float32", MESH)
    assert loaded.model.config == open_clip.CASES["gelu"].config
    expected = ["merges.txt", "open_clip_config.json", "open_clip_pytorch_model.bin", "vocab.json"]
    assert sorted(fetched) == expected


@pytest.mark.parametrize("path", [None, "no such file.pth"])
def test_the_aesthetic_predictor_needs_its_file(path):
    with pytest.raises(UserError, match=r"scorers.aesthetic.path.*sac\+logos\+ava1-l14-linearMSE.pth"):
        load_reward("aesthetic", ScorersConfig(aesthetic=AestheticConfig(path)), MESH)


def test_the_aesthetic_predictor_needs_the_clip_it_was_trained_on(folders):
    config = scorers(folders(open_clip, "quick_gelu"))
    other = AestheticConfig(config.aesthetic.path, str(folders(open_clip, "gelu")))
    with pytest.raises(UserError, match=r"layers.0.weight \[1024, 36\] instead of \[1024, 20\]"):
        load_reward("aesthetic", ScorersConfig(aesthetic=other), MESH)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resize_mode": "longest"}, 'resize_mode is "longest"; must be "shortest" or "squash"'),
        ({"interpolation": "bilinear"}, 'interpolation is "bilinear"; must be "bicubic"'),
        ({"mean": 0.5}, "mean is 0.5; must be a list of 3, each a finite number"),
        ({"mean": [0.5, 0.5]}, "mean is [0.5, 0.5]; must be a list of 3, each a finite number"),
        ({"mean": [0.5, float("nan"), 0.5]}, "mean is [0.5, NaN, 0.5]; must be a list of 3, each a finite number"),
        ({"std": [0.2, "0.2", 0.2]}, 'std is [0.2, "0.2", 0.2]; must be a list of 3, each a positive, finite number'),
        ({"std": [0.2, 0.0, 0.2]}, "std is [0.2, 0.0, 0.2]; must be a list of 3, each a positive, finite number"),
    ],
)
def test_other_ways_of_preparing_images_are_refused(tmp_path, change, message):
    published = open_clip.CASES["gelu"].published
    published["preprocess_cfg"] |= change
    (tmp_path / "open_clip_config.json").write_text(json.dumps(published))
    line = f"{tmp_path}/open_clip_config.json: preprocess_cfg.{message}"
    with pytest.raises(UserError, match=f"^{re.escape(line)}$"):
        load_reward("clip_score", scorers(tmp_path), MESH)


def test_an_open_clip_folder_may_say_how_images_are_normalised(folders):
    folder = folders(open_clip, "heads_of_80")
    published = open_clip.CASES["heads_of_80"].published
    published["preprocess_cfg"] |= {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "size": 37}
    (folder / "open_clip_config.json").write_text(json.dumps(published))
    preprocess = load_clip(str(folder), "float32", MESH).preprocess
    assert (preprocess.mean, preprocess.std) == ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    assert preprocess.size == 37
