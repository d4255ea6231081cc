"""Pictures of parts of a page."""

import shutil

import pytest
from PIL import Image

from dev.report_pictures import SIZE, main, take

PAGE = """<!DOCTYPE html><html><body style="background: #fff">
<svg class="store" width="0" height="0"></svg>
<p id="one" style="background: #f00; height: 50px">one</p>
<p id="two" style="background: #00f; height: 99px"></p>
</body></html>"""


@pytest.mark.skipif(
    shutil.which('chromium') is None, reason='chromium is not installed'
)
def test_take__shows_the_asked_elements_alone(tmp_path):
    take(PAGE, '#two', tmp_path / 'two.png')
    picture = Image.open(tmp_path / 'two.png').convert('RGB')
    assert picture.width == SIZE[0]
    colours = {colour for _, colour in picture.getcolors()}
    assert colours == {(0, 0, 255), (255, 255, 255)}
    blue = dict((colour, n) for n, colour in picture.getcolors())[0, 0, 255]
    assert blue % 99 == 0
    with pytest.raises(SystemExit, match=r'no.png: the page has nothing of'):
        take(PAGE, '#three', tmp_path / 'no.png')


def test_main__says_that_the_browser_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, 'which', lambda name: None)
    assert main([str(tmp_path / 'r.html')]) == 1
    assert 'apt-get install chromium' in capsys.readouterr().err
