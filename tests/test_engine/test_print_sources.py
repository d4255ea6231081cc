"""What a model outputs, as print_sources shows it."""

import re
from pathlib import Path

import pytest

from era_mm import cli


def test_print_sources__of_a_host_config(host, capsys):
    assert cli.run_print_sources([host('retinanet')]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith('model: RetinaNet, ')
    assert lines[0].endswith('on 256x256')
    rows = {line.split()[0]: line.split(None, 2)[1:] for line in lines[1:]}
    assert rows['neck'] == [
        'FPN',
        '16x32x32 /8, 16x16x16 /16, 16x8x8 /32, 16x4x4 /64, 16x2x2 /128',
    ]
    assert rows['backbone.layer3'] == ['ResLayer', '32x16x16 /16']
    # Containers are not called themselves.
    assert 'neck.fpn_convs' not in rows
    assert all(name.count('.') < 2 for name in rows)
    assert cli.run_print_sources([host('retinanet'), '--depth', '1']) == 0
    shallow = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in shallow[1:]] == ['backbone', 'neck']


def test_print_sources__of_a_distillation(make, tmp_path, capsys):
    make('resnet', 'vit')
    out = tmp_path / 'made' / 'resnet_vit.py'
    assert cli.run_print_sources([str(out), '--input-size', '64']) == 0
    student, teacher = capsys.readouterr().out.split('\n\n')
    assert student.startswith('student: ImageClassifier')
    assert 'on 64x64' in student
    assert '64x2x2 /32' in student
    assert teacher.startswith('teacher: ImageClassifier')
    # A class token and 4 x 4 patches of 16 pixels.
    assert re.search(r'backbone.ln1 +LayerNorm +17x24\n', teacher)


def test_print_sources__says_what_it_cannot_run(host, capsys):
    assert cli.run_print_sources(['mmdet::retinanet/retinanet_r50']) == 1
    assert 'Nearest names' in capsys.readouterr().err
    for flag in ('--depth', '--input-size'):
        assert cli.run_print_sources([host('retinanet'), flag, '0']) == 1
        error = capsys.readouterr().err
        assert f'{flag}: expected a number of 1 or more, but got 0' in error


def with_channels(config, number):
    path = Path(config)
    text = path.read_text()
    assert text.count('backbone=dict(') == 1
    path.write_text(
        text.replace('backbone=dict(', f'backbone=dict(in_channels={number}, ')
    )
    return str(path)


@pytest.mark.parametrize('number', [1, 4])
def test_print_sources__of_images_of_other_channels(host, capsys, number):
    config = with_channels(host('retinanet'), number)
    assert cli.run_print_sources([config]) == 0
    (first, *_) = capsys.readouterr().out.splitlines()
    assert first.endswith(f'on 256x256, {number} channels')


def test_print_sources__that_cannot_run_names_the_channels(host, capsys):
    config = with_channels(host('retinanet'), 4)
    assert cli.run_print_sources([config, '--input-size', '0']) == 1
    path = Path(config)
    path.write_text(
        path.read_text().replace('in_channels=[8, 16', 'in_channels=[8, 17')
    )
    capsys.readouterr()
    assert cli.run_print_sources([config, '--input-size', '64']) == 1
    assert 'cannot run on images of 4 channels and [64] pixels' in (
        capsys.readouterr().err
    )


def test_make_config__names_the_channels(host, tmp_path, capsys):
    grey = with_channels(host('retinanet'), 1)

    def make(student, teacher, name):
        return cli.run_make_config(
            [
                *('--student', student, '--teacher', teacher),
                *('--teacher-checkpoint', 'random'),
                *('--out', str(tmp_path / name)),
            ]
        )

    assert make(grey, host('fcos'), 'grey.py') == 0
    assert (
        'grey images, which the teacher gets as three channels; '
        in capsys.readouterr().out
    )
    assert make(host('fcos'), grey, 'turned.py') == 1
    error = capsys.readouterr().err
    assert 'takes images of 1 channels, and the student (' in error
    assert 'of 3. Both have to see the same images' in error
