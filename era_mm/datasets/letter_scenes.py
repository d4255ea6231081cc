"""Letter scenes: data on which no setting of this project was chosen.

The digit scenes' drawing (`digit_scenes`) with ten capital letters in the
fonts that come with matplotlib. No two splits share a font file or a part of
a photograph. The result is a COCO data set.

Source: ours. Fonts: DejaVu, STIX and Computer Modern.

Read in this order: `LetterParams`, `make_letter_scenes`, `letter_material`,
`draw_glyph`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from .digit_drawing import ZOOM, Material, shares, split_photos
from .digit_scenes import SceneParams, write_scenes
from .made_folder import make_folder

MANIFEST = 'letter_scenes.json'
CLASSES = tuple('ABDEGHKMRS')
FONTS = (
    *(
        f'DejaVu{family}{style}.ttf'
        for family, styles in (
            ('Sans', ('', '-Bold', '-Oblique', '-BoldOblique')),
            ('SansMono', ('', '-Bold', '-Oblique', '-BoldOblique')),
            ('Serif', ('', '-Bold', '-Italic', '-BoldItalic')),
        )
        for style in styles
    ),
    *(f'STIXGeneral{style}.ttf' for style in ('', 'Bol', 'Italic', 'BolIta')),
    *(f'cm{style}10.ttf' for style in ('b', 'mi', 'r', 'ss', 'ti', 'tt')),
)

#: Raised whenever the same parameters would give other bytes.
_FORMAT = 1
#: Cells that a capital letter is high. With 8, as a digit has, the widest
#: would be cut off where it is drawn.
_CELLS = 6.0


@dataclass(frozen=True)
class LetterParams(SceneParams):
    """What the data set depends on.

    Equal parameters give equal bytes with the same matplotlib, which has the
    fonts, and the same Pillow, which draws them.

    Args:
        seed: Seed of every random choice; not the digit scenes', whose
            backgrounds and positions it would repeat.
        num_train: Scenes in the train split.
        num_val: Scenes in the val split.
        num_test: Scenes in the test split.
        image_size: Side of the square images in pixels, at least 64.
    """

    seed: int = 1


def make_letter_scenes(
    out: str | Path,
    params: LetterParams | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> bool:
    """Write the data set, or leave an equal one as it is.

    `out` never exists in part.

    Args:
        out: Folder of the data set.
        params: What to make.
        progress: Called with the number of scenes done and the total.

    Returns:
        True if the data set was written, False if it was there already.

    Raises:
        FileExistsError: If `out` holds something else.
    """
    params = params or LetterParams()
    return make_folder(
        out,
        MANIFEST,
        'letter scenes',
        dict(format=_FORMAT, **asdict(params)),
        lambda folder: write_scenes(
            folder,
            params,
            letter_material(params.seed),
            'letter',
            CLASSES,
            progress,
        ),
    )


def letter_material(seed: int) -> dict[str, Material]:
    """Share out fonts and photo tiles; no two splits get the same one.

    A sample's number is that of its font times ten, plus its class.
    """
    rng = np.random.default_rng([seed, 0])
    fonts = shares(rng.permutation(len(FONTS)))
    tiles, regions = split_photos(rng)
    labels = np.arange(len(CLASSES))
    return {
        split: Material(
            split,
            np.concatenate([font * len(CLASSES) + labels for font in chosen]),
            np.tile(labels, len(chosen)),
            np.stack(
                [
                    draw_glyph(FONTS[font], letter)
                    for font in chosen
                    for letter in CLASSES
                ]
            ),
            tiles[split],
            regions[split],
        )
        for split, chosen in fonts.items()
    }


def draw_glyph(name: str, letter: str) -> np.ndarray:
    """Draw a letter in the middle of twelve cells, edges a little soft.

    Args:
        name: File of its font.
        letter: What to draw.
    """
    file = str(Path(matplotlib.get_data_path(), 'fonts', 'ttf', name))
    height = _CELLS * ZOOM
    # The size of a font says nothing of the height of its letters.
    _, top, _, bottom = ImageFont.truetype(file, 100).getbbox('H')
    font = ImageFont.truetype(file, round(100 * height / (bottom - top)))
    left, top, right, bottom = font.getbbox(letter)
    picture = Image.new('L', (12 * ZOOM, 12 * ZOOM))
    ImageDraw.Draw(picture).text(
        (
            (picture.width - left - right) // 2,
            (picture.height - top - bottom) // 2,
        ),
        letter,
        fill=255,
        font=font,
    )
    return ndimage.gaussian_filter(np.asarray(picture) / 255, 1.0)
