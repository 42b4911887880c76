"""Folders whose parts contradict one another, or themselves: one line with file and key, before weights are read."""

import json
import math
import re
import shutil

import pytest

from egrpo_jax.common.errors import UserError
from egrpo_jax.pipelines.families.schedule import scheduled_times
from egrpo_jax.pipelines.published import PublishedOptions
from egrpo_jax.pipelines.published.model import read_model
from egrpo_jax.weights.published.scheduler import read_scheduler
from tests import tiny_flux
from tests.pipelines.test_flux import load

END = len(tiny_flux.CLIP_TOKENS) - 1


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder without weights."""
    folder = tiny_flux.write_pipeline(tmp_path_factory.mktemp("pipeline"))
    for file in folder.glob("*/*.safetensors"):
        file.unlink()
    return folder


@pytest.fixture
def folder(base, tmp_path):
    return shutil.copytree(base, tmp_path / "folder")


def edit(file, **keys):
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def check(folder, text=True):
    model = read_model(folder, PublishedOptions(text_tokens=tiny_flux.TEXT_TOKENS))
    read_scheduler(folder / "scheduler")
    if text:
        model.family.text.read(folder, model.sizes, model.text_tokens)


def published_shift(folder, image_tokens):
    """The shift that is seen in the middle of the grid, s / (1 + s)."""
    _, middle, _ = scheduled_times(read_scheduler(folder), image_tokens, 2)
    return middle / (1 - middle)


def test_parts_that_fit(folder):
    check(folder)
    edit(folder / "text_encoder/config.json", eos_token_id=END)
    check(folder)


CONTRADICTIONS = [
    ("vae", "latent_channels", 8, "must be 4: 2 x 2 latents are the 16 channels of a token"),
    ("vae", "latent_channels", None, "must be a positive integer"),
    ("vae", "scaling_factor", 0, "must be a positive, finite number"),
    ("vae", "shift_factor", math.nan, "must be a finite number, or null"),
    ("vae", "norm_num_groups", 3, "must be a divisor of each of block_out_channels"),
    ("transformer", "in_channels", 18, "latent_channels is 4; must be 4.5"),
    ("transformer", "num_layers", -1, "must be a positive integer"),
    ("transformer", "axes_dims_rope", [4, 5, 7], "must be a list of 3, each a positive, even integer"),
    ("transformer", "axes_dims_rope", [8, 8], "must be a list of 3, each a positive, even integer"),
    ("transformer", "axes_dims_rope", [4, 4, 6], "must be numbers that add up to attention_head_dim 16"),
    ("transformer", "joint_attention_dim", 32, "d_model is 24; must be 32, the joint_attention_dim"),
    ("transformer", "pooled_projection_dim", 24, "hidden_size is 20; must be 24, the pooled_projection_dim"),
    (
        "text_encoder",
        "eos_token_id",
        5,
        f"must be {END}, with which its tokenizer ends prompts, or 2 for the highest id",
    ),
    ("text_encoder", "eos_token_id", [2], "must be a token's id"),
    ("text_encoder", "eos_token_id", None, "must be a token's id"),
    ("text_encoder", "num_attention_heads", 3, "must be a divisor of hidden_size 20"),
    ("text_encoder", "num_attention_heads", 0, "must be a positive integer"),
    ("text_encoder", "vocab_size", END, f"must be above {END}, the last id of its tokenizer"),
    ("text_encoder", "max_position_embeddings", 64, "must be at least 77, the length"),
    ("text_encoder_2", "d_model", [24], "must be a positive integer"),
    ("text_encoder_2", "vocab_size", 20, "must be above "),
    ("text_encoder_2", "relative_attention_num_buckets", 3, "must be at least 4"),
    ("text_encoder_2", "relative_attention_max_distance", 8, "must be above 8"),
    ("text_encoder_2", "layer_norm_epsilon", None, "must be 1e-06"),
]


@pytest.mark.parametrize(("part", "key", "value", "message"), CONTRADICTIONS)
def test_contradictions(folder, part, key, value, message):
    edit(folder / part / "config.json", **{key: value})
    if part != "transformer":
        message = rf"{part}/config\.json: {key} is {re.escape(json.dumps(value))}; {message}"
    with pytest.raises(UserError, match=rf"^{re.escape(str(folder))}/[^\n]*{message}[^\n]*$"):
        check(folder)


def test_a_vae_of_another_stride(folder):
    levels = {
        f"{way}_block_types": [f"{name}Block2D"] * 3 for way, name in (("down", "DownEncoder"), ("up", "UpDecoder"))
    }
    edit(folder / "vae/config.json", block_out_channels=[8, 8, 16], **levels)
    with pytest.raises(UserError, match=r"vae/config\.json: block_out_channels is \[8, 8, 16\]; must be 4 levels"):
        check(folder)


def test_text_encoders_that_are_not_needed_may_be_absent(folder):
    for name in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        shutil.rmtree(folder / name)
    check(folder, text=False)
    with pytest.raises(UserError, match=r"text_encoder_2/config\.json is missing"):
        check(folder)


def test_an_end_that_is_not_the_highest_id(folder):
    """The rule of the highest id would find the start of every prompt."""
    tokens = tiny_flux.CLIP_TOKENS[:-2] + tiny_flux.CLIP_TOKENS[:-3:-1]
    tiny_flux.write_json(folder / "tokenizer/vocab.json", {token: number for number, token in enumerate(tokens)})
    with pytest.raises(
        UserError, match=rf"eos_token_id is 2; must be {END - 1}, with which its tokenizer ends prompts$"
    ):
        check(folder)
    edit(folder / "text_encoder/config.json", eos_token_id=END - 1)
    check(folder)


def test_a_tokenizer_that_adds_no_end(folder):
    file = folder / "tokenizer_2/tokenizer.json"
    edit(file, post_processor=None)
    with pytest.raises(UserError, match=r"tokenizer_2/tokenizer\.json makes \[\] of the prompt ''; must be"):
        check(folder)


def test_the_pipeline_looks_before_it_reads_weights(folder):
    edit(folder / "text_encoder/config.json", eos_token_id=5)
    with pytest.raises(UserError, match="eos_token_id is 5"):
        load(folder)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("max_shift", None, "must be a finite number"),
        ("base_shift", math.inf, "must be a finite number"),
        ("shift", 0, "must be a positive, finite number"),
        ("shift", "3.0", "must be a positive, finite number"),
        ("base_image_seq_len", 256.5, "must be a positive integer"),
        ("use_dynamic_shifting", 1, "must be true or false"),
        ("num_train_timesteps", 500, "must be 1000"),
        ("time_shift_type", "cosine", 'must be "exponential" or "linear"'),
        ("use_karras_sigmas", True, "must be false or null: only a shifted grid"),
        ("use_exponential_sigmas", True, "must be false or null: only a shifted grid"),
        ("use_beta_sigmas", True, "must be false or null: only a shifted grid"),
        ("invert_sigmas", True, "must be false or null: only a shifted grid"),
        ("stochastic_sampling", True, "must be false or null: only a shifted grid"),
        ("shift_terminal", 0.02, "must be false or null: only a shifted grid"),
    ],
)
def test_schedules_that_are_not_followed(folder, key, value, message):
    file = folder / "scheduler/scheduler_config.json"
    edit(file, **{key: value})
    line = f"^{re.escape(str(file))}: {key} is {re.escape(json.dumps(value))}; {message}"
    for read in (lambda: check(folder), lambda: published_shift(folder / "scheduler", 1024)):
        with pytest.raises(UserError, match=line):
            read()


def test_another_scheduler(folder):
    edit(folder / "scheduler/scheduler_config.json", _class_name="FlowMatchHeunDiscreteScheduler")
    with pytest.raises(UserError, match=r"is of a FlowMatchHeunDiscreteScheduler; must be of a FlowMatchEulerDiscrete"):
        check(folder)


@pytest.mark.parametrize(
    ("keys", "shift"),
    [
        ({}, math.exp(0.63)),
        ({"time_shift_type": "linear"}, 0.63),
        ({"use_dynamic_shifting": False, "shift": 2}, 2),
        ({"shift_terminal": None, "use_karras_sigmas": False, "invert_sigmas": None, "new_key": [1]}, math.exp(0.63)),
    ],
)
def test_schedules_that_are_followed(folder, keys, shift):
    edit(folder / "scheduler/scheduler_config.json", **keys)
    check(folder)
    assert published_shift(folder / "scheduler", 1024) == pytest.approx(shift)


@pytest.mark.parametrize(
    "keys",
    [
        {"base_image_seq_len": 4096},
        {"max_shift": 1e6},
        {"base_shift": 1e6},
        {"time_shift_type": "linear", "base_shift": -1.0},
    ],
)
def test_shifts_that_are_none(folder, keys):
    edit(folder / "scheduler/scheduler_config.json", **keys)
    with pytest.raises(UserError, match=r"^\S+/scheduler_config\.json: max_\S+ is [^\n]+$"):
        published_shift(folder / "scheduler", 1024 if "base_shift" in keys else 4000)
