"""Write the digit scenes data set; needs no download.

python tools/make_digit_scenes.py --contact-sheet sheet.png
"""

from era_mm.datasets.command import main
from era_mm.datasets.digit_scenes import SceneParams, make_digit_scenes
from era_mm.visualization.scene_sheet import save_scene_sheet

if __name__ == '__main__':
    main(
        __doc__.splitlines()[0],
        'data/digit_scenes',
        SceneParams,
        make_digit_scenes,
        save_scene_sheet,
    )
