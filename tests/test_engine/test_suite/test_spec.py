"""What a suite file may say, and a schedule made longer."""

import textwrap

import pytest
from mmengine.config import Config

from era_mm.engine.suite.schedule import length_of, stretch
from era_mm.engine.suite.spec import read_suite
from era_mm.errors import UserError

GOOD = """
title = 'Toys'
metric = dict(key='m/ap', name='AP')
seeds = [0, 1]
pairs = dict(a_b=dict(teacher='a', student='b'), c_d=dict(student='d'))
methods = dict(
    plain=dict(config='{student}', role='plain'),
    era=dict(config='era_{pair}', options={'model.x': 1, 'model.y': 2},
             schedule=2, pairs=['a_b']),
    half=dict(part_of='era', options={'model.y': 3}),
)
"""


def written(tmp_path, text):
    file = tmp_path / 'toys.py'
    file.write_text(text)
    return file


def test_suite__is_what_the_file_says(tmp_path):
    suite = read_suite(written(tmp_path, GOOD))
    assert suite.name == 'toys'
    assert suite.seeds == (0, 1)
    assert suite.metric.scale == 1
    assert list(suite.methods) == ['plain', 'era', 'half']
    half = suite.methods['half']
    assert half.role == 'part'
    assert half.config == 'era_{pair}'
    assert half.options == {'model.x': 1, 'model.y': 3}
    assert half.schedule == 2
    first, second = suite.pairs.values()
    assert [m.name for m in suite.methods_of(first)] == [
        'plain',
        'era',
        'half',
    ]
    assert [m.name for m in suite.methods_of(second)] == ['plain']


@pytest.mark.parametrize(
    ('old', 'new', 'message'),
    [
        ("title = 'Toys'", '', 'title is missing'),
        ("title = 'Toys'", "title = 'a'\njobs = 2", 'jobs is not known'),
        ("name='AP'", "nom='AP'", 'name is missing; nom is not known'),
        ('[0, 1]', '[0, 0]', 'each once'),
        ("role='plain'", "role='plane'", "but got 'plane'"),
        ("role='plain'", "role='method'", "with role='plain'"),
        ("part_of='era'", "part_of='eras'", "part_of='eras' after plain, era"),
        ("part_of='era'", "part_of='era', role='method'", 'with role='),
        ("pairs=['a_b']", "pairs=['b_a']", 'names b_a, but the suite has'),
        ('half=', 'teacher=', "not 'teacher'"),
        ("student='d'", "checkpoint='x.pth', student='d'", '`teacher` with'),
        ("config='era_{pair}', ", '', 'config is missing'),
        ("dict(student='d')", "'d'", "expected a dict, but got 'd'"),
    ],
)
def test_suite__refuses_what_it_does_not_know(tmp_path, old, new, message):
    assert old in GOOD
    with pytest.raises(UserError, match=message.replace('(', r'\(')):
        read_suite(written(tmp_path, GOOD.replace(old, new)))


def test_suite__needs_a_file(tmp_path):
    with pytest.raises(UserError, match=r'there is no .*nothing\.py'):
        read_suite(tmp_path / 'nothing.py')
    (tmp_path / 'a.txt').write_text('')
    with pytest.raises(UserError, match='yaml or'):
        read_suite(tmp_path / 'a.txt')


def config(text):
    return Config.fromstring(textwrap.dedent(text), '.py')


def test_stretch__multiplies_what_is_counted_in_epochs():
    cfg = config(
        """
        train_cfg = dict(max_epochs=10, val_interval=10)
        param_scheduler = [
            dict(type='LinearLR', by_epoch=False, begin=0, end=450),
            dict(type='CosineAnnealingLR', T_max=10, begin=0, end=10),
            dict(type='MultiStepLR', milestones=[4, 8], end=10**9),
        ]
        """
    )
    stretch(cfg, 2.5)
    assert length_of(cfg) == ('epochs', 25)
    assert cfg.train_cfg.val_interval == 25
    warm_up, cosine, steps = cfg.param_scheduler
    assert warm_up.end == 450
    assert (cosine.T_max, cosine.begin, cosine.end) == (25, 0, 25)
    assert steps.milestones == [10, 20]
    assert steps.end == 10**9


def test_stretch__of_iterations():
    cfg = config(
        """
        train_cfg = dict(max_iters=100, val_interval=20)
        param_scheduler = [
            dict(type='LinearLR', by_epoch=False, begin=0, end=10),
            dict(type='PolyLR', by_epoch=False, begin=10, end=100),
        ]
        """
    )
    stretch(cfg, 2)
    assert length_of(cfg) == ('iters', 200)
    assert cfg.train_cfg.val_interval == 20
    assert [s.end for s in cfg.param_scheduler] == [20, 200]
    assert cfg.param_scheduler[1].begin == 20


@pytest.mark.parametrize(
    ('text', 'factor', 'message'),
    [
        ('train_cfg = dict(max_epochs=3)', 1.5, '4.5; expected a whole'),
        ('train_cfg = dict(max_epochs=1)', 0.1, 'at least 1'),
        ('train_cfg = dict(type="x")', 2, 'expected `train_cfg.max_epochs`'),
        (
            'train_cfg = dict(max_epochs=3)\n'
            'model = dict(distiller=dict(a=dict(pretrain_iters=5)))',
            2,
            'sets pretrain_iters',
        ),
        (
            'train_cfg = dict(max_iters=8)\n'
            'param_scheduler = dict(type="StepLR", step_size=1)',
            2,
            'StepLR in the other unit',
        ),
        (
            'train_cfg = dict(max_epochs=8)\n'
            'param_scheduler = dict(type="LinearLR", by_epoch=False, begin=3)',
            2,
            'LinearLR in the other unit',
        ),
    ],
)
def test_stretch__refuses_what_it_cannot_know(text, factor, message):
    with pytest.raises(UserError, match=message):
        stretch(config(text), factor)


def test_stretch__by_1_changes_nothing():
    cfg = config('train_cfg = dict(max_epochs=3)\npretrain_iters = 5')
    before = cfg.to_dict()
    stretch(cfg, 1)
    assert cfg.to_dict() == before
