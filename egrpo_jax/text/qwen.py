"""Qwen's tokenizer as image models use it: every prompt is what a user says at the start of a chat.

The form is Qwen3's chat template for one message, written out; a template in the tokenizer's folder is not run. It
changes nothing of a prompt, so that special tokens which a prompt spells are these tokens.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from egrpo_jax.common.errors import UserError
from egrpo_jax.text.tokenizers import PublishedTokenizer, read_tokenizer

CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
"""A prompt as Z-Image was trained on: the answer may begin with thoughts."""
CHAT_WITHOUT_THOUGHTS = f"{CHAT}<think>\n\n</think>\n\n"
"""A prompt as FLUX.2-klein was trained on: thoughts are over, and there were none."""
PAD = "<|endoftext|>"


def load_qwen_tokenizer(folder: str | os.PathLike[str], length: int, template: str) -> PublishedTokenizer:
    """Qwen's byte-level byte-pair encoding, from `tokenizer.json`.

    Ids are int32 `[B, length]`: the prompt within the template, cut at the end, whatever that leaves of the template,
    or padded with `<|endoftext|>`. FLUX.2-klein and Z-Image have 512; the mask tells padding from tokens, which
    their encoder must not attend to.

    Args:
      folder: the tokenizer's.
      length: of every row.
      template: `CHAT` or `CHAT_WITHOUT_THOUGHTS`.

    Raises:
      UserError: the file is missing, damaged, or of a tokenizer without the special tokens of `template`.
    """
    path = Path(folder, "tokenizer.json")
    special = (PAD, *re.findall(r"<[^<>\s]+>", template))
    tokenizer, ids = read_tokenizer(path, *special)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    for token, expected in zip(special, ids, strict=True):
        if (found := tokenizer.encode(token).ids) != [expected]:
            raise UserError(f"{path} makes {found} of {token}; must be [{expected}]: give the model's own tokenizer")
    return PublishedTokenizer(tokenizer, length, PAD, template.format)
