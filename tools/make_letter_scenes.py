"""Write the letter scenes data set; needs no download.

python tools/make_letter_scenes.py --contact-sheet sheet.png
"""

from era_mm.datasets.command import main
from era_mm.datasets.letter_scenes import LetterParams, make_letter_scenes
from era_mm.visualization.scene_sheet import save_scene_sheet

if __name__ == '__main__':
    main(
        __doc__.splitlines()[0],
        'data/letter_scenes',
        LetterParams,
        make_letter_scenes,
        save_scene_sheet,
    )
