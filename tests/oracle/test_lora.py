"""Adapters against PEFT's, and LoRA files that diffusers reads and writes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

from egrpo_jax.models.flux import Flux, FluxConfig  # noqa: E402
from egrpo_jax.models.lora import LoraConfig, adapted_layers, apply_lora, init_lora  # noqa: E402
from egrpo_jax.pipelines import published  # noqa: E402
from egrpo_jax.pipelines.families import FLUX  # noqa: E402
from egrpo_jax.weights.layout import published_shapes  # noqa: E402
from egrpo_jax.weights.lora import FILE_NAME, export_lora, load_lora, save_lora  # noqa: E402
from egrpo_jax.weights.published.flux import flux_layout  # noqa: E402
from tests.layouts import import_tensors  # noqa: E402
from tests.oracle.flux import CASES, cotangent, inputs, published_model, published_velocity  # noqa: E402

FLOW_GRPO, DANCE_GRPO = (options.adapters(FLUX.presets) for options in (published.FLOW_GRPO, published.DANCE_GRPO))

CASE = CASES["dev"]
MODEL = Flux(CASE.config)
LAYOUT = flux_layout(CASE.config, "diffusers")
FLOW_GRPO_NAMES = [
    "attn.to_k", "attn.to_q", "attn.to_v", "attn.to_out.0", "attn.add_k_proj", "attn.add_q_proj", "attn.add_v_proj",
    "attn.to_add_out", "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2",
]  # fmt: skip
DANCE_GRPO_NAMES = ["to_k", "to_q", "to_v", "to_out.0"]


def arguments():
    return tuple(jnp.asarray(array) for array in inputs(CASE).values())


@functools.cache
def base_params():
    """The parameters of `published_model`, as ours."""
    template = jax.eval_shape(functools.partial(MODEL.init, grid=CASE.grid), jax.random.key(0), *arguments())["params"]
    tensors = {name: tensor.numpy() for name, tensor in published_model(CASE.config).state_dict().items()}
    return import_tensors(LAYOUT, tensors, template)


def random_lora(config):
    rng = np.random.default_rng(3)
    shapes = jax.eval_shape(lambda: init_lora(jax.random.key(0), base_params(), config))
    return jax.tree.map(lambda leaf: 0.2 * rng.standard_normal(leaf.shape).astype(np.float32), shapes)


@functools.partial(jax.jit, static_argnames="scale")
def our_velocity(lora, scale):
    return apply_lora(MODEL, {"params": base_params(), "lora": lora}, *arguments(), grid=CASE.grid, scale=scale)


def their_velocity(model):
    return published_velocity(model, CASE, {name: torch.from_numpy(array) for name, array in inputs(CASE).items()})


def with_random_adapters(**options):
    """diffusers' model with PEFT adapters, all of whose matrices are random."""
    model = published_model(CASE.config)
    model.add_adapter(peft.LoraConfig(init_lora_weights="gaussian", **options))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def assert_same(ours, theirs):
    theirs = theirs.detach().numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())


def pipeline_around(model):
    others = ("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    return diffusers.FluxPipeline(transformer=model, **dict.fromkeys(others))


@pytest.mark.parametrize(("config", "names"), [(FLOW_GRPO, FLOW_GRPO_NAMES), (DANCE_GRPO, DANCE_GRPO_NAMES)])
def test_published_target_names_match_the_same_layers(config, names):
    model = peft.get_peft_model(published_model(CASE.config), peft.LoraConfig(r=2, target_modules=names))
    theirs = {
        name.removeprefix("base_model.model.").partition(".lora_A")[0]
        for name, _ in model.named_parameters()
        if ".lora_A" in name
    }
    ours = set(adapted_layers(base_params(), config.targets))
    assert {
        e.name.removesuffix(".weight") for e in LAYOUT if e.leaves[0].path.removesuffix("/kernel") in ours
    } == theirs


@pytest.mark.parametrize("targets", [FLOW_GRPO.targets, DANCE_GRPO.targets, ("",)])
def test_diffusers_loads_what_we_write(tmp_path, targets):
    """`("",)` adapts every linear layer, that of the last modulation too, whose halves change places."""
    config = LoraConfig(rank=4, alpha=6, targets=targets)
    lora = random_lora(config)
    save_lora(tmp_path / FILE_NAME, lora, config.scale, LAYOUT)
    model = published_model(CASE.config)
    plain = their_velocity(model).detach().numpy()
    pipeline_around(model).load_lora_weights(tmp_path)
    theirs = their_velocity(model)
    assert np.abs(theirs.detach().numpy() - plain).max() > 0.05 * np.abs(plain).max()
    assert_same(our_velocity(lora, config.scale), theirs)


SCALES = [
    {"r": 4, "lora_alpha": 4},
    {"r": 4, "lora_alpha": 6, "alpha_pattern": {"to_out.0": 2}},
    {"r": 4, "lora_alpha": 6, "use_rslora": True},
    {"r": 4, "lora_alpha": 6, "rank_pattern": {"transformer_blocks.1.attn.to_q": 2}},
]


@pytest.mark.parametrize("options", SCALES)
def test_we_load_what_diffusers_writes(tmp_path, options):
    model = with_random_adapters(target_modules=FLOW_GRPO_NAMES, **options)
    metadata = {"transformer_lora_adapter_metadata": model.peft_config["default"].to_dict()}
    tensors = peft.get_peft_model_state_dict(model)
    diffusers.FluxPipeline.save_lora_weights(tmp_path, tensors, **metadata)
    lora = load_lora(tmp_path, 1.5, LAYOUT, base_params())
    assert_same(our_velocity(lora, 1.5), their_velocity(model))


@pytest.mark.parametrize("options", SCALES)
def test_we_load_what_a_transformer_of_diffusers_writes(tmp_path, options):
    model = with_random_adapters(target_modules=FLOW_GRPO_NAMES, **options)
    model.save_lora_adapter(tmp_path)
    assert_same(our_velocity(load_lora(tmp_path, 1.5, LAYOUT, base_params()), 1.5), their_velocity(model))


@pytest.mark.parametrize("options", SCALES)
def test_we_load_what_peft_writes(tmp_path, options):
    config = peft.LoraConfig(init_lora_weights=False, target_modules=FLOW_GRPO_NAMES, **options)
    model = peft.get_peft_model(published_model(CASE.config), config)
    model.save_pretrained(tmp_path)
    lora = load_lora(tmp_path, 1.5, LAYOUT, base_params())
    assert_same(our_velocity(lora, 1.5), their_velocity(model.base_model.model))


KOHYA_MODULES = {  # diffusers' conversion knows single blocks' linear1 at full size only
    "double_blocks": ("img_attn_qkv", "txt_attn_qkv", "img_attn_proj", "txt_mlp_0", "img_mlp_2", "img_mod_lin"),
    "single_blocks": ("linear2", "modulation_lin"),
}


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("prefix", ["lora_unet_", "diffusion_model."])
def test_we_load_what_diffusers_converts(tmp_path, prefix, apart):
    """kohya's and ComfyUI's names; queries, keys and values joined in both ways."""
    rng, tensors, original = np.random.default_rng(5), {}, flux_layout(CASE.config, "bfl")
    shapes = published_shapes(original, base_params())
    for name in (name.removesuffix(".weight") for name in shapes if name.endswith(".weight")):
        stack, _, module = name.replace(".", "_").partition("_blocks_")
        if module[2:] in KOHYA_MODULES.get(f"{stack}_blocks", ()):
            outputs, inputs = shapes[f"{name}.weight"]
            key = prefix + (name.replace(".", "_") if prefix.endswith("_") else name)
            up = 0.1 * rng.standard_normal((outputs, 6)).astype(np.float32)
            if apart and name.endswith("qkv"):
                up *= np.kron(np.eye(3, dtype=np.float32), np.ones((outputs // 3, 2), np.float32))
            down = 0.1 * rng.standard_normal((6, inputs)).astype(np.float32)
            tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
            tensors[f"{key}.alpha"] = np.array(9 + len(tensors), np.float32)
    assert len(tensors) == 3 * (2 * 6 + 3 * 2)
    safetensors.numpy.save_file(tensors, tmp_path / FILE_NAME)
    model = published_model(CASE.config)
    plain = their_velocity(model).detach().numpy()
    pipeline_around(model).load_lora_weights(tmp_path)
    theirs = their_velocity(model)
    assert np.abs(theirs.detach().numpy() - plain).max() > 0.05 * np.abs(plain).max()
    lora = load_lora(tmp_path, 1.5, LAYOUT + original, base_params())
    assert_same(our_velocity(lora, 1.5), theirs)
    ranks = {name: p.shape[0] for name, p in model.named_parameters() if "to_q.lora_A" in name}
    assert set(ranks.values()) == {lora["double_blocks"]["image_qkv"]["to_q"]["a"].shape[-1]} == {2 if apart else 6}


@pytest.mark.parametrize("apart", [False, True])
def test_the_joined_layer_of_single_blocks(tmp_path, apart):
    """At full size, by diffusers' converted tensors."""
    sizes = FluxConfig()
    rng, layout = np.random.default_rng(5), flux_layout(sizes, "diffusers")
    up = rng.standard_normal((7 * 3072, 8)).astype(np.float32)
    if apart:
        for number, rows in enumerate(np.split(up, [3072, 6144, 9216])):
            rows[:, np.arange(8) // 2 != number] = 0
    key = "lora_unet_single_blocks_37_linear1"
    tensors = {
        f"{key}.lora_down.weight": rng.standard_normal((8, 3072)).astype(np.float32),
        f"{key}.lora_up.weight": up,
    }
    safetensors.numpy.save_file(tensors, tmp_path / FILE_NAME)
    lora = load_lora(tmp_path, 1.0, layout + flux_layout(sizes, "bfl"), FLUX.shapes(sizes))
    ours = export_lora(lora, 1.0, layout)
    theirs = diffusers.FluxPipeline.lora_state_dict(tmp_path)
    assert {name for name in ours if "_blocks.37." in name} == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(ours[name], tensor.numpy(), err_msg=name)


def with_factors(tensors):
    """Adapters of Flow-GRPO's layers with the A and B of `tensors`, without any scale in them."""
    lora = random_lora(LoraConfig(FLOW_GRPO.targets, rank=4))
    flat = flatten_dict(lora, sep="/")
    for e in LAYOUT:
        path, module = e.leaves[0].path.removesuffix("/kernel"), f"transformer.{e.name.removesuffix('.weight')}"
        if f"{path}/a" in flat:
            flat[f"{path}/a"][e.leaves[0].layer] = tensors[f"{module}.lora_A.weight"].numpy().T
            flat[f"{path}/b"][e.leaves[0].layer] = tensors[f"{module}.lora_B.weight"].numpy().T
    return lora


def test_gradients_are_those_of_peft():
    """By A and B of every adapter."""
    model = with_random_adapters(r=4, lora_alpha=6, target_modules=FLOW_GRPO_NAMES)
    tensors = {f"transformer.{name}": tensor for name, tensor in peft.get_peft_model_state_dict(model).items()}
    lora = with_factors(tensors)
    objective = lambda lora: (our_velocity(lora, 1.5) * cotangent(CASE)).sum()
    ours = export_lora(jax.grad(objective)(lora), 1.0, LAYOUT)
    (their_velocity(model) * torch.from_numpy(cotangent(CASE))).sum().backward()
    theirs = {name.replace(".default", ""): p.grad.numpy() for name, p in model.named_parameters() if "lora_" in name}
    assert {f"transformer.{name}" for name in theirs} == ours.keys()
    for name, gradient in theirs.items():
        got = ours[f"transformer.{name}"]
        np.testing.assert_allclose(got, gradient, atol=1e-4 * np.abs(gradient).max(), err_msg=name)


def test_a_fresh_adapter_is_drawn_as_peft_draws_it():
    """The standard deviation of A, and B."""
    model = published_model(CASE.config)
    model.add_adapter(peft.LoraConfig(r=16, init_lora_weights="gaussian", target_modules=DANCE_GRPO_NAMES))
    fresh = init_lora(jax.random.key(0), base_params(), LoraConfig(rank=16, targets=DANCE_GRPO.targets))
    ours = export_lora(fresh, 1.0, LAYOUT)
    theirs = {
        name.replace(".default", ""): p.detach().numpy() for name, p in model.named_parameters() if "lora_" in name
    }
    for name, array in theirs.items():
        got = ours[f"transformer.{name}"]
        assert got.shape == array.shape
        np.testing.assert_allclose(got.std(), array.std(), rtol=0.1)
