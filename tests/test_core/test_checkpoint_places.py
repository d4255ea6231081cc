"""Several places of a teacher's file, and its SHA-256."""

import functools
import hashlib
import http.server
import threading

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS

from era_mm.core import read_checkpoint
from era_mm.engine.preflight import check_checkpoints
from era_mm.errors import UserError
from era_mm.testing import detector_config, distillation_config, save_teacher


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A web server of ``tmp_path/web``; the hub's folder is a new one."""
    folder = tmp_path / 'web'
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            """Nothing on the screen."""

    httpd = http.server.ThreadingHTTPServer(
        ('127.0.0.1', 0), functools.partial(Handler, directory=str(folder))
    )
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    hub = torch.hub.get_dir()
    torch.hub.set_dir(str(tmp_path / 'hub'))
    yield folder, f'http://127.0.0.1:{httpd.server_port}'
    torch.hub.set_dir(hub)
    httpd.shutdown()
    httpd.server_close()


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_places__the_first_that_can_be_read_is_taken(server):
    folder, url = server
    for value in (1.0, 2.0):
        torch.save({'w': torch.full((2,), value)}, folder / f'{value}.pth')
    places = [f'{url}/gone.pth', f'{url}/1.0.pth', f'{url}/2.0.pth']
    assert read_checkpoint(places)['w'].tolist() == [1, 1]
    # Now from the cache.
    (folder / '1.0.pth').unlink()
    assert read_checkpoint(places)['w'].tolist() == [1, 1]


def test_places__all_are_named_if_none_can_be_read(server, tmp_path):
    _, url = server
    with pytest.raises(ValueError, match='None of 2 places') as caught:
        read_checkpoint([f'{url}/gone.pth', str(tmp_path / 'none.pth')])
    assert 'HTTPError: HTTP Error 404' in str(caught.value)
    assert 'none.pth' in str(caught.value)
    assert not list((tmp_path / 'hub').rglob('gone*'))
    with pytest.raises(ValueError, match='empty list'):
        read_checkpoint([])


def test_sha256__another_file_is_refused(server, tmp_path):
    folder, url = server
    torch.save({'w': torch.ones(2)}, folder / 'f.pth')
    right = digest(folder / 'f.pth')
    for place in (f'{url}/f.pth', str(folder / 'f.pth')):
        assert 'w' in read_checkpoint(place, right[:8].upper())
        with pytest.raises(ValueError, match='begins with 0123abcd'):
            read_checkpoint(place, '0123abcd')
    # A wrong file at the first place does not end the search.
    torch.save({'w': torch.zeros(2)}, folder / 'g.pth')
    found = read_checkpoint([str(folder / 'g.pth'), f'{url}/f.pth'], right[:8])
    assert found['w'].tolist() == [1, 1]


def test_places__what_is_no_checkpoint_does_not_stand_in_the_way(server):
    """Mirrors have the same file under the same name."""
    folder, url = server
    for name in ('dead', 'old', 'good'):
        (folder / name).mkdir()
    (folder / 'dead' / 't.pth').write_text('<html>moved</html>')
    torch.save({'w': torch.zeros(2)}, folder / 'old' / 't.pth')
    torch.save({'w': torch.ones(2)}, folder / 'good' / 't.pth')
    with pytest.raises(FileNotFoundError, match='what came is no checkpoint'):
        read_checkpoint(f'{url}/dead/t.pth')
    places = [f'{url}/{name}/t.pth' for name in ('dead', 'old', 'good')]
    right = digest(folder / 'good' / 't.pth')[:8]
    assert read_checkpoint(places, right)['w'].tolist() == [1, 1]


@pytest.mark.parametrize('sha256', ['', 12345678, 'sha256:0123'])
def test_sha256__must_be_digits(sha256):
    config = distillation_config(dict(type='era_mm.ERADistiller'))
    config['teacher']['sha256'] = sha256
    with pytest.raises(ValueError, match='the first digits of a SHA-256'):
        MODELS.build(config)


def test_teacher__takes_places_and_a_digest(tmp_path):
    file = tmp_path / 't.pth'
    teacher = detector_config(width=16, channels=24)
    save_teacher(teacher, file)
    config = distillation_config(
        dict(type='era_mm.ERADistiller'), teacher=teacher
    )
    config['teacher'] |= dict(
        checkpoint=[str(tmp_path / 'none.pth'), str(file)],
        sha256=digest(file)[:8],
    )
    model = MODELS.build(config)
    model.load_teachers()
    weights = torch.load(file, weights_only=False)['state_dict']
    for key, value in model.teachers['teacher'].model.state_dict().items():
        assert torch.equal(value, weights[key]), key


def test_preflight__one_place_that_is_there_is_enough(tmp_path):
    file = tmp_path / 't.pth'
    torch.save({'w': torch.ones(2)}, file)

    def check(places):
        check_checkpoints(
            Config(dict(model=dict(teacher=dict(checkpoint=places))))
        )

    check(['none.pth', str(file)])
    check(['none.pth', 'https://example.org/t.pth'])
    with pytest.raises(UserError, match=r'none\.pth.*; .*other\.pth'):
        check(['none.pth', 'other.pth'])
