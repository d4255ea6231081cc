"""Take the pictures in docs/images from the report of `make demo`.

python -m dev.report_pictures work_dirs/demo/report.html

Needs Debian's `chromium`. The pictures are parts of the page as a browser
shows it: the decomposition with the finest maps of an image, and the
detections on that image.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageChops

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / 'docs' / 'images'
#: Elements of the page by picture; {image} is the article of an image.
PARTS = {
    'report_decomposition.png': (
        '#unexplained-0 > :not(details)',
        # The finest level: a caption and a row of maps, three times. The
        # first paragraph is no caption.
        '{image} .heats > .line:nth-of-type(-n+4)',
        '{image} .heats > .maps:nth-of-type(-n+3)',
    ),
    'report_detections.png': ('.legend', '{image} .views'),
}
#: Pixels; a picture is cut to what is on it.
SIZE = (956, 1600)
# Only these elements stay, in the order of the page.
SCRIPT = """
<style>body {{ padding: 8px !important; max-width: none !important; }}
.views {{ grid-template-columns: repeat(4, 1fr) !important; }}
.maps {{ grid-template-columns: repeat(var(--columns), 1fr) !important; }}
</style>
<script>
const left = document.querySelectorAll({selector});
document.body.replaceChildren(document.querySelector('svg.store'), ...left);
</script>
</body>
"""


def take(page: str, selector: str, out: Path) -> None:
    """Write a picture of some elements of a page."""
    script = SCRIPT.format(selector=json.dumps(selector))
    with tempfile.TemporaryDirectory() as name:
        part = Path(name, 'part.html')
        # The last: the page's scripts may have the word, too.
        head, _, tail = page.rpartition('</body>')
        part.write_text(head + script + tail)
        shot = Path(name, 'shot.png')
        subprocess.run(
            [
                *('chromium', '--headless', '--no-sandbox', '--disable-gpu'),
                *('--no-first-run', '--hide-scrollbars'),
                f'--user-data-dir={name}/profile',
                f'--window-size={SIZE[0]},{SIZE[1]}',
                '--virtual-time-budget=30000',
                f'--screenshot={shot}',
                part.as_uri(),
            ],
            check=True,
            capture_output=True,
        )
        picture = Image.open(shot).convert('RGB')
    white = Image.new('RGB', picture.size, 'white')
    box = ImageChops.difference(picture, white).getbbox()
    if box is None:
        raise SystemExit(f'{out.name}: the page has nothing of {selector}.')
    bottom = min(box[3] + 8, picture.height)
    picture.crop((0, 0, picture.width, bottom)).save(out, optimize=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Write both pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('report', type=Path)
    parser.add_argument(
        '--image', type=int, default=0, help='place among the images shown'
    )
    parser.add_argument('--out', type=Path, default=IMAGES)
    args = parser.parse_args(argv)
    if shutil.which('chromium') is None:
        print('chromium is missing: apt-get install chromium', file=sys.stderr)
        return 1
    page = args.report.read_text()
    image = f'.picture:nth-of-type({args.image + 1})'
    for name, parts in PARTS.items():
        selector = ', '.join(parts).format(image=image)
        take(page, selector, args.out / name)
        print(args.out / name)
    return 0


if __name__ == '__main__':
    sys.exit(main())
