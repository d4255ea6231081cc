"""Reading weights, from anywhere, and writing extras."""

import functools
import hashlib
import http.server
import re
import threading

import pytest
import torch
from mmengine.registry import MODELS

from era_mm.core import checkpoint, read_checkpoint
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
    with pytest.raises(ValueError, match='None of the 2 given') as caught:
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
    with pytest.raises(
        FileNotFoundError, match='the file is not a checkpoint'
    ):
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


ERA = dict(type='era_mm.ERADistiller')


def test_extras__are_put_on_the_cpu_when_a_file_is_written(
    monkeypatch, tmp_path
):
    moved = []
    to_cpu = checkpoint.to_cpu
    monkeypatch.setattr(
        checkpoint,
        'to_cpu',
        lambda value: moved.append(value) or to_cpu(value),
    )
    model = MODELS.build(distillation_config(ERA))
    state = model.state_dict()
    assert not moved
    torch.save(state, tmp_path / 'f.pth')
    assert [set(value) for value in moved] == [{'distiller'}]


def build(**kwargs):
    return MODELS.build(distillation_config(ERA) | kwargs)


def message_of(error):
    return re.sub(r'\s+', ' ', str(error.value))


def teacher_at(checkpoint, **kwargs):
    config = detector_config(width=16, channels=24, **kwargs)
    return dict(config=config, checkpoint=str(checkpoint))


def load(checkpoint, **kwargs):
    model = build(teacher=teacher_at(checkpoint, **kwargs))
    model.init_weights()


def test_checkpoint__missing_file_says_where_it_looked(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        load(tmp_path / 'none.pth')
    assert str(tmp_path) in message_of(error)


def test_checkpoint__truncated_file(tmp_path, teacher_file):
    whole = open(teacher_file, 'rb').read()
    (tmp_path / 'cut.pth').write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match='truncated or not a checkpoint'):
        load(tmp_path / 'cut.pth')


def test_checkpoint__something_else(tmp_path):
    (tmp_path / 'text.pth').write_text('not a checkpoint')
    with pytest.raises(ValueError, match='truncated or not a checkpoint'):
        load(tmp_path / 'text.pth')
    torch.save([1, 2, 3], tmp_path / 'list.pth')
    with pytest.raises(ValueError, match='holds no weights'):
        load(tmp_path / 'list.pth')


def test_checkpoint__other_shapes_and_missing_keys_are_shown(tmp_path):
    other = detector_config(width=16, channels=32)
    file = save_teacher(other, tmp_path / 'wide.pth')
    with pytest.raises(ValueError) as error:
        load(file)
    text = message_of(error)
    assert 'other shapes' in text
    assert 'neck.lateral_convs.0.conv.weight: file (32, 32, 1, 1)' in text
    assert 'model (24, 32, 1, 1)' in text

    state = torch.load(file, weights_only=False)
    del state['state_dict']['backbone.conv1.weight']
    state['state_dict']['extra.weight'] = torch.zeros(1)
    torch.save(state, tmp_path / 'keys.pth')
    with pytest.raises(ValueError) as error:
        load(tmp_path / 'keys.pth')
    text = message_of(error)
    assert 'missing in the file (1): backbone.conv1.weight' in text
    assert 'not in the model (1): extra.weight' in text


def test_checkpoint__a_student_that_training_wrote_can_teach(tmp_path):
    config = detector_config(width=16, channels=24)
    trained = MODELS.build(distillation_config(ERA, student=config))
    torch.save({'state_dict': trained.state_dict()}, tmp_path / 's.pth')
    load(tmp_path / 's.pth')
