"""What a model outputs, as print_sources shows it."""

import re

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
