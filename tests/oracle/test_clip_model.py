"""PickScore and CLIP scores against transformers' own CLIPModel, run live, from the folders that it writes."""

import numpy as np
import pytest

from egrpo_jax.models.clip import image_flops
from egrpo_jax.parallel.mesh import MeshConfig, make_mesh
from egrpo_jax.rewards.clip import clip_score, pickscore
from egrpo_jax.rewards.config import ClipScoreConfig, PickScoreConfig, ScorersConfig
from tests.oracle.clip_model import CASES, GOLDEN, cases, outputs, published_model
from tests.oracle.scored_images import SIZES, images, prompts
from tests.oracle.tokenizers import write_clip

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

MESH = make_mesh(MeshConfig())


def test_golden_file_is_up_to_date():
    made = cases()
    with np.load(GOLDEN) as file:
        assert made.keys() == set(file.files)
        for key, array in made.items():
            scale = 100 if "/scores_" in key else 1
            np.testing.assert_allclose(array / scale, file[key] / scale, rtol=0, atol=1e-5, err_msg=key)


@pytest.mark.parametrize("name", CASES)
def test_scores_of_every_size_of_images(name, tmp_path):
    model = published_model(CASES[name])
    model.save_pretrained(tmp_path)
    write_clip(tmp_path)
    scorers = ScorersConfig(pickscore=PickScoreConfig(str(tmp_path)), clip_score=ClipScoreConfig(str(tmp_path)))
    reward, expected, scale = pickscore(scorers, MESH), outputs(CASES[name], model), 100
    for size in SIZES:
        got = reward(images(size) / np.float32(255), prompts(size))
        np.testing.assert_allclose(got / scale, expected[f"scores_{size}"] / scale, rtol=0, atol=1e-5, err_msg=size)
    cosines = clip_score(scorers, MESH)(images("wide") / np.float32(255), prompts("wide"))
    np.testing.assert_allclose(
        cosines * model.logit_scale.exp().item() / scale, expected["scores_wide"] / scale, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("name", CASES)
def test_operations_as_torch_counts_them(name):
    from torch.utils.flop_counter import FlopCounterMode

    config, model = CASES[name].config, published_model(CASES[name])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.get_image_features(torch.zeros(1, 3, config.vision.image_size, config.vision.image_size))
    assert counter.get_total_flops() == image_flops(config)
