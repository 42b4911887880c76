"""LoRA files of other programs: the same adapters in each of their layouts, and what is refused in a line."""

import chex
import numpy as np
import pytest

from egrpo_jax.common.errors import UserError
from egrpo_jax.models.lora import merge_lora
from egrpo_jax.weights.layout import export_tensors
from egrpo_jax.weights.lora import FILE_NAME, export_lora, load_lora
from tests.weights.tiny_lora import (
    BFL_LAYOUT,
    LAYOUT,
    TO_Q,
    adapter,
    delta,
    random_like,
    random_lora,
    template,
    write,
)

A, B = f"transformer.{TO_Q}.lora_A.weight", f"transformer.{TO_Q}.lora_B.weight"

TOP = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
DOUBLE = {
    "img_mod.lin": "norm1.linear",
    "txt_mod.lin": "norm1_context.linear",
    "img_attn.qkv": "attn.to_q attn.to_k attn.to_v",
    "txt_attn.qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
}
SINGLE = {
    "modulation.lin": "norm.linear",
    "linear1": "attn.to_q attn.to_k attn.to_v proj_mlp",
    "linear2": "proj_out",
}
ORIGINAL = {
    **{bfl: [module] for bfl, module in TOP.items()},
    **{
        f"double_blocks.{layer}.{bfl}": [f"transformer_blocks.{layer}.{module}" for module in modules.split()]
        for layer in range(2)
        for bfl, modules in DOUBLE.items()
    },
    **{
        f"single_blocks.{layer}.{bfl}": [f"single_transformer_blocks.{layer}.{module}" for module in modules.split()]
        for layer in range(3)
        for bfl, modules in SINGLE.items()
    },
}
"""diffusers' modules, by the original ones that hold them."""


def diffusers_tensors():
    """Adapters of all linear layers, in diffusers' names."""
    return export_lora(random_lora(), 1.0, LAYOUT)


def renamed(tensors, prefix, factors="lora_A lora_B", underscores=False):
    """`tensors` of diffusers' names with another prefix, other names of A and B, and '_' for '.' in modules."""
    new = {}
    for name, tensor in tensors.items():
        module, factor = name.removeprefix("transformer.").removesuffix(".weight").rsplit(".", 1)
        module = module.replace(".", "_") if underscores else module
        new[f"{prefix}{module}.{factors.split()['AB'.index(factor[-1])]}.weight"] = tensor
    return new


def share_a(tensors):
    """`tensors` with the first A of joined layers in all of them."""
    shared = dict(tensors)
    for modules in ORIGINAL.values():
        for module in modules:
            shared[f"transformer.{module}.lora_A.weight"] = tensors[f"transformer.{modules[0]}.lora_A.weight"]
    return shared


def joined(tensors, apart):
    """A and B by original modules, prefixed as diffusers' are; `apart`: adapters keep their own A."""
    new = {}
    for original, modules in ORIGINAL.items():
        a, b = ([tensors[f"transformer.{module}.lora_{letter}.weight"] for module in modules] for letter in "AB")
        if original == "final_layer.adaLN_modulation.1":
            scale, shift = np.split(b[0], 2)
            b = [np.concatenate([shift, scale])]
        new[f"transformer.{original}.lora_A.weight"] = np.concatenate(a) if apart else a[0]
        new[f"transformer.{original}.lora_B.weight"] = block_diagonal(b) if apart else np.concatenate(b)
    return new


def block_diagonal(blocks):
    full = np.zeros((sum(len(block) for block in blocks), sum(block.shape[1] for block in blocks)), np.float32)
    row = column = 0
    for block in blocks:
        full[row : row + len(block), column : column + block.shape[1]] = block
        row, column = row + len(block), column + block.shape[1]
    return full


def load(path, scale=2.0):
    return load_lora(path, scale, LAYOUT + BFL_LAYOUT, template())


SPELLINGS = {
    "transformer alone": {"prefix": ""},
    "PEFT": {"prefix": "base_model.model."},
    "old diffusers": {"prefix": "transformer.", "factors": "lora.down lora.up"},
    "OneTrainer": {"prefix": "lora_transformer_", "factors": "lora_down lora_up", "underscores": True},
    "ComfyUI": {"prefix": "diffusion_model."},
    "ComfyUI, down and up": {"prefix": "diffusion_model.", "factors": "lora_down lora_up"},
    "kohya": {"prefix": "lora_unet_", "factors": "lora_down lora_up", "underscores": True},
}


@pytest.mark.parametrize("spelling", list(SPELLINGS)[:5])
def test_other_names(tmp_path, spelling):
    tensors = diffusers_tensors()
    expected = load(write(tmp_path / "diffusers.safetensors", tensors))
    other = write(tmp_path / "other.safetensors", renamed(tensors, **SPELLINGS[spelling]))
    chex.assert_trees_all_equal(load(other), expected)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("spelling", ["transformer alone", "PEFT", "ComfyUI", "ComfyUI, down and up", "kohya"])
def test_original_modules_that_join_layers(tmp_path, spelling, apart):
    """Joined layers share A, or B is block-diagonal; the last modulation's halves change places."""
    tensors = diffusers_tensors() if apart else share_a(diffusers_tensors())
    expected = load(write(tmp_path / "diffusers.safetensors", tensors))
    other = write(tmp_path / "other.safetensors", renamed(joined(tensors, apart), **SPELLINGS[spelling]))
    chex.assert_trees_all_equal(load(other), expected)


def test_joined_layers_add_to_the_original_weights_what_the_file_says(tmp_path):
    """W + alpha / r * B A by the original's tensors, against merged kernels; some ranks can be divided among layers."""
    rng, tensors, changes = np.random.default_rng(0), {}, {}
    params = random_like(template(), 1)
    original = dict(export_tensors(BFL_LAYOUT, params))
    for number, module in enumerate(ORIGINAL):
        outputs, inputs = original[f"{module}.weight"].shape
        rank, alpha = 2 + number % 5, 1.5 + number
        a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((rank, inputs), (outputs, rank)))
        key = f"lora_unet_{module.replace('.', '_')}"
        tensors |= {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b}
        if number % 2:  # kohya's rule for the others: alpha is the rank
            tensors[f"{key}.alpha"] = np.float32(alpha)
        changes[f"{module}.weight"] = (alpha / rank if number % 2 else 1) * b @ a
    loaded = load(write(tmp_path / "x.safetensors", tensors), scale=0.5)
    merged = dict(export_tensors(BFL_LAYOUT, merge_lora(params, loaded, 0.5)))
    for name, weight in original.items():
        np.testing.assert_allclose(merged[name], weight + changes.get(name, 0), rtol=1e-4, atol=1e-3, err_msg=name)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int64])
def test_an_alpha_of_any_shape(tmp_path, shape, dtype):
    tensors = adapter() | {f"transformer.{TO_Q}.alpha": np.full(shape, 4, dtype)}
    loaded = load(write(tmp_path / "x.safetensors", tensors))
    np.testing.assert_allclose(delta(loaded), 4 / 2 * (tensors[B] @ tensors[A]).T, rtol=1e-5)


def set_values(name, value):
    def change(tensors):
        tensors[name] = tensors[name].copy()
        tensors[name][0, 0] = value

    return change


def extra(name, *shape):
    return lambda tensors: tensors.update({name: np.ones(shape, np.float32)})


def alpha(*values):
    return lambda tensors: tensors.update({f"transformer.{TO_Q}.alpha": np.array(values, np.float32)})


def add(other):
    return lambda tensors: tensors.update(other)


QKV = "double_blocks.1.img_attn.qkv"

REFUSED = {
    "A without B": (lambda t: t.pop(B), rf"{TO_Q} has only transformer\.{TO_Q}\.lora_A\.weight; expected"),
    "B without A": (lambda t: t.pop(A), rf"{TO_Q} has only transformer\.{TO_Q}\.lora_B\.weight; expected"),
    "alpha alone": (extra("transformer.proj_out.alpha"), r"proj_out has only transformer\.proj_out\.alpha; expected"),
    "ranks": (lambda t: t.update({A: np.ones((3, 16), np.float32)}), r"lora_A \(3, 16\) and lora_B \(16, 2\)"),
    "rank 0": (add(adapter(rank=0)), r"lora_A \(0, 16\) and lora_B \(16, 0\), expected .* r at least 1"),
    "shape": (add(adapter(TO_Q, inputs=12)), "maps 12 to 16, in the base model 16 to 16"),
    "convolution": (lambda t: t.update({A: t[A][:, :, None, None]}), r"lora_A \(2, 16, 1, 1\)"),
    "joined shape": (add(adapter(QKV, outputs=47)), f"{QKV} maps 16 to 47, in the base model 16 to 48"),
    "no such block": (add(adapter("transformer_blocks.7.attn.to_q")), r"blocks\.7\.attn\.to_q is no linear layer"),
    "no linear layer": (add(adapter("transformer_blocks.1.attn.norm_q")), "norm_q is no linear layer"),
    "nan": (set_values(A, np.nan), rf"{A} has values that are infinite or not a number"),
    "inf": (set_values(B, -np.inf), rf"{B} has values that are infinite or not a number"),
    "int8": (lambda t: t.update({A: np.ones((2, 16), np.int8)}), f"{A} is of type int8, expected floating-point"),
    "alpha 0": (alpha(0), r"alpha is 0\.0, expected a positive number"),
    "negative alpha": (alpha(-1), r"alpha is -1\.0, expected a positive number"),
    "infinite alpha": (alpha(np.inf), "alpha is inf, expected a positive number"),
    "alpha of no number": (alpha(np.nan), "alpha is nan, expected a positive number"),
    "two alphas": (alpha(1, 2), r"alpha is of shape \(2,\), expected one number"),
    "DoRA, PEFT": (extra(f"transformer.{TO_Q}.lora_magnitude_vector", 16), "is part of DoRA; only plain LoRA"),
    "DoRA, kohya": (extra("lora_unet_double_blocks_0_img_mlp_0.dora_scale", 64, 1), "is part of DoRA"),
    "LoHa": (extra("lora_unet_double_blocks_0_img_mlp_0.hada_w1_a", 16, 2), "hada_w1_a is part of LoHa"),
    "LoKr": (extra("lora_unet_double_blocks_0_img_mlp_0.lokr_w1", 4, 4), "lokr_w1 is part of LoKr"),
    "Tucker": (extra("lora_unet_double_blocks_0_img_mlp_0.lora_mid.weight", 2, 2), "is part of a Tucker"),
    "whole tensor": (extra("diffusion_model.double_blocks.0.img_mlp.0.diff_b", 64), "diff_b is a whole tensor"),
    "bias": (extra(f"transformer.{TO_Q}.lora_B.bias", 16), r"lora_B\.bias is a bias \(lora_bias\)"),
    "norm": (extra("double_blocks.0.img_attn.norm.query_norm.scale", 8), "is a norm, as in a LoRA for control"),
    "XLabs": (extra("double_blocks.0.processor.qkv_lora1.down.weight", 2, 16), r"in the layout of .*XLabs"),
    "CLIP": (extra("text_encoder.text_model.layers.0.q.lora_A.weight", 2, 8), "is an adapter of a text encoder"),
    "CLIP, kohya": (extra("lora_te1_text_model_layers_0_q.lora_down.weight", 2, 8), "is an adapter of a text encoder"),
    "T5, ComfyUI": (extra("text_encoders.t5xxl.transformer.q.lora_A.weight", 2, 8), "is an adapter of a text encoder"),
    "no LoRA": (extra(f"transformer.{TO_Q}.weight", 16, 16), rf"{TO_Q}\.weight is not part of a LoRA"),
    "two prefixes": (
        add(renamed(adapter("proj_out"), "lora_unet_")),
        "mixes two layouts: .*lora_unet_proj",
    ),
    "two spellings": (
        add(renamed(adapter(), "transformer.", "lora_down lora_up")),
        "mixes two layouts: .*lora_B.weight and .*lora_up.weight",
    ),
    "joined and not": (add(adapter(QKV, outputs=48)), r"mixes two layouts: .*1\.\S* is there under another name too"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_files_that_are_refused(tmp_path, case):
    change, message = REFUSED[case]
    tensors = adapter()
    change(tensors)
    path = write(tmp_path / "x.safetensors", tensors)
    with pytest.raises(UserError, match=rf"^{path}.*{message}") as error:
        load(path)
    assert "\n" not in str(error.value)


def test_files_of_nothing_or_of_something_else(tmp_path):
    path = write(tmp_path / "x.safetensors", {}, format="pt")
    with pytest.raises(UserError, match=rf"^{path} holds no tensors; expected MODULE\.lora_A"):
        load(path)
    write(path, adapter())
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match=rf"^{path} is damaged: .*download it again"):
        load(path)
    path.write_bytes(b"PK\x03\x04 a pickle of PyTorch")
    with pytest.raises(UserError, match=rf"^{path} is damaged: .*; give a safetensors file"):
        load(path)


def test_folders(tmp_path):
    """The usual names go first; where they leave a choice, it is the user's."""
    with pytest.raises(UserError, match=rf"^{tmp_path} has no {FILE_NAME} or adapter_model\.safetensors"):
        load(tmp_path)
    only = adapter(rank=3)
    write(tmp_path / "any.safetensors", only)
    chex.assert_trees_all_equal(load(tmp_path), load(tmp_path / "any.safetensors"))
    write(tmp_path / "model.safetensors", {"weight": np.ones(2, np.float32)})
    write(tmp_path / "adapter_model.safetensors", renamed(adapter(), "base_model.model."))
    chex.assert_trees_all_equal(load(tmp_path), load(tmp_path / "adapter_model.safetensors"))
    (tmp_path / "model.safetensors").unlink()
    write(tmp_path / FILE_NAME, adapter())
    with pytest.raises(UserError, match="name one of them"):
        load(tmp_path)
