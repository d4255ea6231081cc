"""What a config gives our classes: types by annotations, ranges by names."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pytest
from mmengine.config import Config

from era_mm.core import LossSchedule, Teacher
from era_mm.engine import PreflightHook
from era_mm.engine.config_check import check_config, remarks_on
from era_mm.errors import UserError
from era_mm.methods.era import ERADistiller, TWIHook
from era_mm.registry import MODELS
from era_mm.validation import find_fault

NAN, INF = float('nan'), float('inf')


@pytest.mark.parametrize(
    ('value', 'hint', 'fault'),
    [
        (1, float, ''),
        (1.5, float, ''),
        (NAN, float, 'a number that is finite'),
        (-INF, float, 'a number that is finite'),
        ('1', float, 'a number'),
        (True, float, 'a number'),
        (None, float, 'a number'),
        (None, float | None, ''),
        ('x', float | None, 'a number or None'),
        (1.0, int, 'a whole number'),
        (True, int, 'a whole number'),
        (3, int, ''),
        ('yes', bool, 'True or False'),
        (1, bool, 'True or False'),
        (False, bool, ''),
        (3, str, 'a string'),
        ('ST', Sequence[str], 'a list'),
        (['S', 3], Sequence[str], 'in the list a string'),
        (('S', 'T'), list[str], ''),
        ([1, NAN], Sequence[float] | None, 'in the list a number that'),
        ((64, 64), int | tuple[int, int], ''),
        ((64, 64, 3), tuple[int, int], '2 values'),
        ((64,), tuple[int, ...], ''),
        ({'a': 1}, dict, ''),
        ([], dict, 'a dict'),
        ({'a': 'b'}, Mapping[str, int], "in entry 'a' a whole number"),
        ({1: 2}, Mapping[str, int], 'as key'),
        ('c', Literal['a', 'b'], "one of ('a', 'b')"),
        (object(), Any, ''),
        (object(), Teacher, ''),
    ],
)
def test_find_fault__follows_the_annotation(value, hint, fault):
    found = find_fault(value, hint)
    assert bool(found) == bool(fault)
    assert fault in found


@MODELS.register_module(force=True)
class PlainNewMethod:
    """Has no line for its checks."""

    RANGES = {'share': (0, 1)}

    def __init__(
        self,
        loss_weight: float = 1.0,
        share: float = 0.5,
        norm_cfg: dict | None = None,
        names: Sequence[str] = (),
    ) -> None:
        self.share = share


@pytest.mark.parametrize(
    ('arguments', 'said'),
    [
        (dict(loss_weight=-1), '`loss_weight`: expected at least 0'),
        (dict(loss_weight=INF), '`loss_weight`: expected a number that is'),
        (
            dict(loss_weight='1'),
            "`loss_weight`: expected a number, but got '1'",
        ),
        (dict(share=2), '`share`: expected between 0 and 1, but got 2'),
        (dict(norm_cfg={}), "`norm_cfg`: expected a dict with 'type'"),
        (dict(names='abc'), "`names`: expected a list, but got 'abc'"),
    ],
)
def test_registered_class__is_checked_for_free(arguments, said):
    config = dict(type='era_mm.PlainNewMethod', **arguments)
    with pytest.raises(ValueError) as caught:
        MODELS.build(config)
    assert said in str(caught.value)
    # As Python's own for a wrong type.
    assert isinstance(caught.value, TypeError)


def test_registered_class__takes_what_is_right():
    config = dict(type='era_mm.PlainNewMethod', loss_weight=0, share=1)
    assert MODELS.build(config).share == 1


@pytest.mark.parametrize('value', [-1, NAN, INF, '1', None])
@pytest.mark.parametrize(
    ('kind', 'key'),
    [
        ('CWDDistiller', 'loss_weight'),
        ('ResidualKDDistiller', 'student_weight'),
        ('IEKDDistiller', 'pretrain_iters'),
        ('SoKDDistiller', 'adapter_weight'),
        ('TrunkToBranchDistiller', 'peer_weight'),
    ],
)
def test_weights__are_finite_and_not_negative(kind, key, value):
    with pytest.raises(UserError, match=key):
        check_config(
            Config(dict(model={'type': f'era_mm.{kind}', key: value}))
        )


@pytest.mark.parametrize('value', [-1, NAN, INF, '1', None])
@pytest.mark.parametrize(
    'key', ['align_weight', 'residual_weight', 'twi_weight']
)
def test_weights__of_eras_losses_are_checked_where_they_are_built(key, value):
    with pytest.raises(ValueError, match=key):
        ERADistiller(loss={key: value})


@pytest.mark.parametrize('key', ['start', 'ramp', 'scale'])
def test_schedule__refuses_nan(key):
    with pytest.raises(ValueError, match=key):
        LossSchedule(**{key: NAN})


def test_other_classes__are_checked_where_they_are_built():
    with pytest.raises(ValueError, match='modes'):
        TWIHook(modes='ST')
    with pytest.raises(ValueError, match='num_images'):
        PreflightHook(num_images=-1)
    with pytest.raises(ValueError, match='config'):
        Teacher(config=None, checkpoint='random')
    with pytest.raises(ValueError, match='checkpoint'):
        Teacher(config=dict(type='x'), checkpoint=3)


def test_check_config__names_all_keys_at_once():
    cfg = Config(
        dict(
            model=dict(
                type='era_mm.Distillation',
                student=dict(type='mmdet.RetinaNet'),
                input_size=0,
                distiller=dict(
                    a=dict(type='era_mm.ERADistiller', detach='no', los={})
                ),
            ),
            custom_hooks=[dict(type='era_mm.TWIHook', modes='ST')],
            check_finite=3,
            strict_load='no',
            report=dict(plian='x'),
            preflight=dict(num_images=-1),
            my_own_variable=3,
        )
    )
    with pytest.raises(UserError) as caught:
        check_config(cfg)
    lines = str(caught.value).splitlines()[1:]
    text = '\n'.join(lines)
    for part in (
        'model.input_size: expected at least 1, but got 0',
        "model.distiller.a.detach: expected True or False, but got 'no'",
        'model.distiller.a.los: ERADistiller has no such key, did you mean '
        "'loss'?",
        "custom_hooks[0].modes: expected a list, but got 'ST'",
        'preflight.num_images: expected at least 0, but got -1',
        'check_finite: expected True, False, or a dict',
        "strict_load: expected True or False, but got 'no'",
        "report.plian: RunTableHook has no such key, did you mean 'plain'?",
    ):
        assert part in text
    assert 'my_own_variable' not in text


@pytest.mark.parametrize('name', ['PreciseBNHook', 'SimSiamHook', 'SwAVHook'])
def test_check_config__refuses_hooks_of_one_student_for_two(name):
    hooks = [dict(type='EMAHook'), dict(type=f'mmpretrain.{name}')]
    model = dict(type='era_mm.MutualDistillation')
    with pytest.raises(UserError, match=rf'custom_hooks\[1\]: {name} is not'):
        check_config(Config(dict(model=model, custom_hooks=hooks)))
    model['type'] = 'era_mm.Distillation'
    check_config(Config(dict(model=model, custom_hooks=hooks)))


@pytest.mark.parametrize(
    ('key', 'meant'),
    [
        ('preflihgt', 'preflight'),
        ('reprot', 'report'),
        ('custom_hoosk', 'custom_hooks'),
        ('trian_cfg', 'train_cfg'),
        ('custom_hook', 'custom_hooks'),
        ('val_dataloder', 'val_dataloader'),
    ],
)
def test_check_config__refuses_misspelt_top_level_keys(key, meant):
    said = f'{key}: .* did you mean {meant}'
    with pytest.raises(UserError, match=said):
        check_config(Config({key: []}))
    # A base may have the right one.
    with pytest.raises(UserError, match=said):
        check_config(Config({key: [], meant: False}))


def test_check_config__names_the_nearest_class_and_own_key():
    cfg = Config(
        dict(
            preflight=False,
            preflihgt=dict(num_images=3),
            model=dict(
                type='era_mm.Distilation',
                distiller=dict(type='era_mm.ERADistiler'),
            ),
        )
    )
    with pytest.raises(UserError) as caught:
        check_config(cfg)
    for part in (
        # Beside the right one, too.
        'preflihgt: no such key, did you mean preflight?',
        "model.type: era_mm has no 'era_mm.Distilation', did you mean "
        "'era_mm.Distillation'?",
        "model.distiller.type: era_mm has no 'era_mm.ERADistiler', did you "
        "mean 'era_mm.ERADistiller'?",
    ):
        assert part in str(caught.value)


def test_check_config__leaves_the_hosts_words_alone():
    check_config(
        Config(
            dict(
                train_pipeline=[],
                test_pipeline=[],
                train_pipeline_1e=[],
                val_evaluator=[],
                val_evaluator_abs=[],
                data_root='',
                img_scales=[1],
                optim_wrapper=dict(type='OptimWrapper'),
                model=dict(type='mmdet.RetinaNet', loss_weight=-1),
            )
        )
    )


@pytest.mark.parametrize(
    ('config', 'said'),
    [
        (dict(train_cfg=dict(max_epochs=0)), 'max_epochs is 0'),
        (dict(train_cfg=dict(max_epochs=-1)), 'max_epochs is -1'),
        (
            dict(optim_wrapper=dict(clip_grad=dict(max_norm=-1))),
            'max_norm is -1',
        ),
        (
            dict(optim_wrapper=dict(clip_grad=dict(max_norm=NAN))),
            'max_norm is nan',
        ),
        (
            dict(model=dict(data_preprocessor=dict(std=[0, 0, 0]))),
            'model.data_preprocessor.std is [0, 0, 0]',
        ),
        (
            dict(model=dict(data_preprocessor=dict(std=0))),
            'model.data_preprocessor.std is 0:',
        ),
        (
            dict(
                train_cfg=dict(max_epochs=3),
                param_scheduler=[
                    dict(type='LinearLR', by_epoch=False, end=500),
                    dict(type='CosineAnnealingLR', begin=3, end=12),
                ],
            ),
            'param_scheduler[1].begin is 3, but the run has 3 epochs',
        ),
        (
            dict(
                train_cfg=dict(max_iters=100),
                param_scheduler=dict(
                    type='MultiStepLR', by_epoch=False, milestones=[100, 200]
                ),
            ),
            'param_scheduler[0].milestones is [100, 200], but the run has 100',
        ),
    ],
)
def test_remarks_on__name_what_makes_a_run_pointless(config, said):
    (remark,) = remarks_on(Config(config))
    assert said in remark


def test_remarks_on__have_nothing_to_say_of_a_sound_config():
    assert not remarks_on(
        Config(
            dict(
                train_cfg=dict(max_epochs=1),
                param_scheduler=[
                    dict(type='LinearLR', by_epoch=False, begin=5, end=50),
                    dict(type='MultiStepLR', begin=0, milestones=[]),
                ],
                optim_wrapper=dict(clip_grad=dict(max_norm=1)),
                model=dict(data_preprocessor=dict(std=[58.0, 57.0, 57.0])),
            )
        )
    )
