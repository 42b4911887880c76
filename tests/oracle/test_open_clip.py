"""Scores under CLIPs against open_clip's own, run live, from files that PyTorch writes."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from egrpo_jax.models.clip import ClipConfig, ClipVisionConfig, TransformerConfig
from egrpo_jax.parallel.mesh import MeshConfig, make_mesh
from egrpo_jax.rewards import clip
from egrpo_jax.rewards.clip_files import hps_version
from egrpo_jax.rewards.config import AestheticConfig, ClipScoreConfig, HpsConfig, ScorersConfig
from egrpo_jax.text.tokenizers import load_open_clip_tokenizer
from egrpo_jax.weights.configs import Published
from egrpo_jax.weights.published.open_clip import config_from_open_clip
from tests.oracle.open_clip import CASES, GOLDEN, cases, marks, outputs, published_head, published_model
from tests.oracle.scored_images import SIZES, TEXTS, images, prompts
from tests.oracle.tokenizers import write_clip, write_clip_files
from tests.text.test_tokenizers import up_to_the_end

torch = pytest.importorskip("torch")
published = pytest.importorskip("open_clip")

MESH = make_mesh(MeshConfig())


@pytest.fixture(scope="module", params=CASES)
def written(request, tmp_path_factory):
    """A case, open_clip's model of it, and a folder with all its files as they are published."""
    case, folder = CASES[request.param], tmp_path_factory.mktemp(request.param)
    model = published_model(case)
    state = model.state_dict()
    torch.save(state, folder / "open_clip_pytorch_model.bin")
    half = {name: tensor.half() for name, tensor in state.items()}
    torch.save({"epoch": 3, "name": "x", "state_dict": half}, folder / "HPS_v2.1_compressed.pt")
    head = published_head(case.dim).state_dict()
    torch.save({f"layers.{name}": tensor for name, tensor in head.items()}, folder / "aesthetic.pth")
    (folder / "open_clip_config.json").write_text(json.dumps(case.published))
    write_clip(folder)
    return case, model, folder


@pytest.fixture(scope="module")
def scorers(written):
    folder = str(written[2])
    return ScorersConfig(
        hps=HpsConfig(folder, folder),
        clip_score=ClipScoreConfig(folder),
        aesthetic=AestheticConfig(f"{folder}/aesthetic.pth", folder),
    )


def test_golden_file_is_up_to_date():
    made = cases()
    with np.load(GOLDEN) as file:
        assert made.keys() == set(file.files)
        for key, array in made.items():
            np.testing.assert_allclose(array, file[key], rtol=0, atol=1e-5, err_msg=key)


def test_cosines_of_every_size_of_images(written, scorers):
    case, model, folder = written
    expected = outputs(case, model)
    rewards = {"hps": clip.hpsv2_1(scorers, MESH, case.config), "clip": clip.clip_score(scorers, MESH)}
    for kind, reward in rewards.items():
        for size in case.sizes:
            got = reward(images(size) / np.float32(255), prompts(size))
            np.testing.assert_allclose(got, expected[f"{kind}_{size}"], rtol=0, atol=1e-5, err_msg=f"{kind} {size}")
    assert hps_version(folder / "HPS_v2.1_compressed.pt") == "2.1"


def test_marks_of_the_aesthetic_predictor(written, scorers):
    reward, expected = clip.aesthetic(scorers, MESH), marks(written[0])
    for size in SIZES:
        got = reward(images(size) / np.float32(255), prompts(size))
        np.testing.assert_allclose(got, expected[f"marks_{size}"], rtol=0, atol=1e-5)


def test_pytorch_names_an_archive_by_its_file(tmp_path):
    """So that a renamed file still says which version it is of."""
    torch.save({"state_dict": {"logit_scale": torch.ones(())}}, tmp_path / "HPS_v2_compressed.pt")
    assert hps_version((tmp_path / "HPS_v2_compressed.pt").rename(tmp_path / "hps.pt")) == "2.0"


@pytest.fixture(scope="module")
def real_vocabulary(tmp_path_factory):
    """CLIP's own vocabulary, from the file inside open_clip, in the two files of transformers."""
    folder = tmp_path_factory.mktemp("vocabulary")
    lines = gzip.decompress(Path(published.__file__).with_name("bpe_simple_vocab_16e6.txt.gz").read_bytes()).decode()
    merges = [tuple(line.split()) for line in lines.split("\n")[1:48895]]
    vocabulary = published.get_tokenizer("ViT-H-14").encoder
    spelled = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    write_clip_files(folder, {spelled.get(piece, piece): number for piece, number in vocabulary.items()}, merges)
    return folder


def test_ids_over_the_real_vocabulary(real_vocabulary):
    texts = [
        *TEXTS,
        "A photorealistic portrait of Ada Lovelace, 8k, trending on ArtStation -- ar 16:9",
        "\u2018Curly\u2019 “quotes”, an ellipsis… and a naïve café № 5 ½",
        "&quot;neon&quot; sign that says &#39;open 24/7&#39; &amp;quot;now&amp;quot;",
        "schÃ¶ne GrÃ¼ÃŸe aus MÃ¼nchen, Straße",
        "Привет, мир! नमस्ते दुनिया, مرحبا بالعالم, สวัสดีชาวโลก",
        "👨‍👩‍👧‍👦 family ❤️‍🔥 at 5\u202f000\u00a0m, e\u0301 vs é, \u200bzero-width, tab\tnew\nline",
        "I'll we've they'd DON'T y'all's 'tis",
        "\ufb02u\ufb00y \uff48i ① ² x_y_z <html> \x1b[31mred\x1b[0m",
    ]
    expected = published.get_tokenizer("ViT-H-14")(texts).numpy()
    assert up_to_the_end(load_open_clip_tokenizer(real_vocabulary)(texts)) == up_to_the_end(expected)


@pytest.mark.parametrize(
    ("name", "size", "activation"), [("ViT-H-14", 224, "gelu"), ("ViT-H-14-378-quickgelu", 378, "quick_gelu")]
)
def test_open_clips_own_configs(name, size, activation):
    config = config_from_open_clip(Published(published.get_model_config(name)))
    assert config.vision == ClipVisionConfig(TransformerConfig(1280, 32, 16, 5120, activation), size, 14)
    assert config.text.transformer == TransformerConfig(1024, 24, 16, 4096, activation)
    assert config.dim == ClipConfig().dim
