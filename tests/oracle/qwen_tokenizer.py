"""Qwen's tokenizer as transformers and diffusers use it, over a small vocabulary: what ours is held against.

`python -m tests.oracle.qwen_tokenizer` writes tests/golden/qwen_tokenizer.npz. The vocabulary is built by rule, so that
golden ids do not depend on a trainer.
"""

import json
import tempfile
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from tests.oracle.tokenizers import PROMPTS as COMMON_PROMPTS
from tests.oracle.tokenizers import WORDS, byte_letters
from tests.oracle.torchvision_shim import define_missing_operators

GOLDEN = Path(__file__).parent.parent / "golden" / "qwen_tokenizer.npz"
LENGTHS = (64, 12)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
NOT_SPECIAL = ("<think>", "</think>")  # as Qwen3 publishes them
PROMPTS = (
    *COMMON_PROMPTS,
    "the cat " * 1000,
    "<|im_end|>\n<|im_start|>system\nthe dog<|im_end|>",
    "<|endoftext|>",
    "cat<|endoftext|>",
    "<think>the dog</think> and the cat",
    "<tool_response>the cat</tool_response>",
    "<|im_start|",
    "  the cat \n\n",
    "\n\n<think>\r\n",
    "{} {prompt} {{ messages }} {% if %} %s \\n",
    "Кот на крыше, قطة، חתול, แมว",
    "e\u0301 \u00e9 \ufb01 ﷺ \u200b\u00a0|",
    "don't I'LL 3.14 1234 a_b",
)
WORDS_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEMPLATE = r"""
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}
"""


def write_qwen(folder, special=SPECIAL, not_special=NOT_SPECIAL):
    """A `tokenizer.json` as Qwen's: bytes, `WORDS` joined from the left, then with a space before them."""
    letters = byte_letters()
    merges = []
    for word in WORDS:
        parts = [letters[byte] for byte in word.encode()]
        merges += [("".join(parts[:place]), parts[place]) for place in range(1, len(parts))]
    merges += [(letters[ord(" ")], "".join(letters[byte] for byte in word.encode())) for word in WORDS]
    merges = list(dict.fromkeys(merges))
    pieces = dict.fromkeys([*letters.values(), *("".join(pair) for pair in merges)])
    tokenizer = Tokenizer(models.BPE({piece: number for number, piece in enumerate(pieces)}, merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in not_special])
    tokenizer.save(str(Path(folder, "tokenizer.json")))


def write_settings(folder, name="Qwen2Tokenizer"):
    """The file beside it that transformers reads too."""
    settings = {
        "tokenizer_class": name, "pad_token": "<|endoftext|>", "eos_token": "<|im_end|>", "unk_token": None,
        "bos_token": None, "add_prefix_space": False, "chat_template": TEMPLATE, "model_max_length": 131072,
    }  # fmt: skip
    Path(folder, "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")


def published_tokenizer(folder):
    """transformers' tokenizer."""
    define_missing_operators()
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def published_tokens(tokenizer, length, thinking, prompts=PROMPTS):
    """Ids, int32 `[B, length]`, and mask of prompts as pipelines have transformers make them."""
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=thinking
        )
        for prompt in prompts
    ]
    encoded = tokenizer(texts, padding="max_length", max_length=length, truncation=True)
    return np.array(encoded.input_ids, np.int32), np.array(encoded.attention_mask, bool)


def cases():
    """Ids and masks of `PROMPTS` by name."""
    with tempfile.TemporaryDirectory() as folder:
        write_qwen(folder)
        write_settings(folder)
        tokenizer = published_tokenizer(folder)
        named = {}
        for length in LENGTHS:
            for name, thinking in (("klein", False), ("z_image", True)):
                ids, mask = published_tokens(tokenizer, length, thinking)
                named |= {f"{name}_{length}/ids": ids, f"{name}_{length}/mask": mask}
        return named


def main():
    np.savez_compressed(GOLDEN, **cases())


if __name__ == "__main__":
    main()
