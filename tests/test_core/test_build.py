"""From configs to students, teachers and distillers."""

import copy

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from mmengine.runner import Runner

from era_mm.core import Distillation, distillation_kind
from era_mm.core.build import as_named_configs, build_distillers, build_student
from era_mm.testing import (
    detection_batch,
    detector_config,
    distillation_config,
    run_config,
)


@pytest.mark.parametrize(
    ('kind', 'expected'),
    [
        ('era_mm.Distillation', 'Distillation'),
        ('MutualDistillation', 'MutualDistillation'),
        (Distillation, 'Distillation'),
        ('mmdet.RetinaNet', None),
        (None, None),
    ],
)
def test_kind__of_a_models_config(kind, expected):
    assert distillation_kind(dict(type=kind)) == expected


def test_named_configs__of_one_have_the_role_as_name():
    one = dict(type='A', width=3)
    assert as_named_configs(one, 'distiller', 'type') == {'distiller': one}
    two = dict(a=one, b=one)
    assert as_named_configs(two, 'distiller', 'type') == two
    assert as_named_configs(None, 'distiller', 'type') == {}


@pytest.mark.parametrize(
    ('value', 'error', 'message'),
    [
        ([dict(type='A')], TypeError, r'`distiller` must be a dict'),
        (dict(a=dict(kind='A')), ValueError, "'a' must be a dict with 'type'"),
        (dict(a=3), ValueError, "'a' must be a dict with 'type', but got 3"),
        (dict(my_loss=dict(type='A')), ValueError, 'must not be named'),
    ],
)
def test_named_configs__that_are_none_are_refused(value, error, message):
    with pytest.raises(error, match=message):
        as_named_configs(value, 'distiller', 'type')


def test_distillers__that_are_none_are_refused():
    with pytest.raises(TypeError, match="'a' must be a BaseDistiller"):
        build_distillers(
            dict(a=dict(type='Linear', in_features=1, out_features=1))
        )


def test_student__draws_what_the_plain_model_does():
    torch.manual_seed(3)
    distillers = build_distillers(dict(type='era_mm.ERADistiller'))
    built = build_student(detector_config(), None, distillers)
    after = torch.rand(1)
    torch.manual_seed(3)
    plain = build_student(detector_config(), None, {})
    assert torch.equal(torch.rand(1), after)
    for key, value in plain.module.state_dict().items():
        assert torch.equal(built.module.state_dict()[key], value), key
    assert built.config == plain.config


ERA = dict(type='era_mm.ERADistiller')


@pytest.mark.parametrize('name', ['feat_loss', 'a.b'])
def test_distiller__name_that_would_enter_the_loss_is_refused(name):
    config = distillation_config({}) | dict(distiller={name: ERA})
    with pytest.raises(ValueError, match='must not be named'):
        MODELS.build(config)


def build(inherit, distiller=ERA, **kwargs):
    # The head as wide as the teacher's, the neck's inputs narrower.
    config = distillation_config(
        distiller, student=detector_config(channels=24), **kwargs
    )
    model = MODELS.build(dict(config, inherit=inherit))
    model.init_weights()
    return model


def parts(model, module):
    return {
        key: value.clone()
        for key, value in model.state_dict().items()
        if key.startswith(f'{module}.')
    }


def batch_for(model):
    data = model.data_preprocessor(detection_batch(), True)
    return data['inputs'], data['data_samples']


def test_inherit__only_what_has_the_same_shape_is_taken():
    model = build(['neck'])
    theirs = model.teachers['teacher'].model.state_dict()
    for key, value in parts(model, 'neck').items():
        taken = value.shape == theirs[key].shape and value.dim() > 1
        if value.dim() > 1:
            assert ('fpn_convs' in key) == taken, key
            assert taken == (taken and torch.equal(value, theirs[key]))


def test_inherit__named_modules_start_as_the_teachers_and_no_other():
    torch.manual_seed(0)
    plain = build(None)
    torch.manual_seed(0)
    model = build(['bbox_head'])
    theirs = model.teachers['teacher'].model.state_dict()
    head = parts(model, 'bbox_head')
    same = {
        key
        for key, value in head.items()
        if value.shape == theirs[key].shape and torch.equal(value, theirs[key])
    }
    assert same == {
        key for key in head if head[key].shape == theirs[key].shape
    }
    assert same
    before = plain.state_dict()
    for key, value in model.state_dict().items():
        if key not in same:
            assert torch.equal(value, before[key]), key
    assert not torch.equal(
        head['bbox_head.retina_cls.weight'],
        before['bbox_head.retina_cls.weight'],
    )


def test_inherit__trains_the_student_and_leaves_the_teacher_alone():
    model = build(['bbox_head'])
    teacher = copy.deepcopy(model.teachers['teacher'].model.state_dict())
    inputs, samples = batch_for(model)
    losses = model(inputs, samples, mode='loss')
    sum(
        value if torch.is_tensor(value) else sum(value)
        for key, value in losses.items()
        if 'loss' in key
    ).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.1 * parameter.grad
    for key, value in model.teachers['teacher'].model.state_dict().items():
        assert torch.equal(value, teacher[key]), key


def test_inherit__without_a_distiller_is_a_plain_run_from_that_start():
    model = build(['bbox_head'], distiller=None)
    inputs, samples = batch_for(model)
    calls = []
    model.teachers['teacher'].model.register_forward_hook(
        lambda *_: calls.append(1)
    )
    losses = model(inputs, samples, mode='loss')
    expected = model.student(inputs, samples, mode='loss')
    assert set(losses) == set(expected) == {'loss_cls', 'loss_bbox'}
    for key, value in expected.items():
        assert torch.equal(sum(losses[key]), sum(value))
    assert not calls
    assert not list(model.distillers.parameters())


def test_inherit__loading_a_file_comes_after_it(tmp_path):
    model = build(['bbox_head'])
    with torch.no_grad():
        for value in model.student.state_dict().values():
            value.zero_()
    state = copy.deepcopy(model.state_dict())
    fresh = build(['bbox_head'])
    fresh.load_state_dict(state)
    assert not any(v.any() for v in parts(fresh, 'bbox_head').values())


@pytest.mark.parametrize(
    ('inherit', 'message'),
    [
        (['neckk'], "nothing of 'neckk' from 'teacher'.*its 0 tensors"),
        ({'bbox_head': 'other'}, "from a teacher 'other'.*'teacher'"),
    ],
)
def test_inherit__what_cannot_be_inherited_is_refused(inherit, message):
    with pytest.raises(ValueError, match=message):
        build(inherit)


def test_inherit__several_teachers_need_names():
    config = distillation_config(ERA, student=detector_config(channels=24))
    teacher = config['teacher']
    config['teacher'] = dict(a=teacher, b=copy.deepcopy(teacher))
    config['distiller'] = dict(ERA, teacher='a')
    with pytest.raises(ValueError, match='does not name a teacher'):
        MODELS.build(dict(config, inherit=['bbox_head']))
    model = MODELS.build(dict(config, inherit={'bbox_head': 'b'}))
    # Teachers of one config with random weights are alike.
    model.teachers['b'].model.bbox_head.retina_cls.weight.add_(1)
    model.init_weights()
    key = 'bbox_head.retina_cls.weight'
    own = model.state_dict()[key]
    for name, same in (('a', False), ('b', True)):
        theirs = model.teachers[name].model.state_dict()[key]
        assert torch.equal(own, theirs) == same


def test_inherit__no_distiller_and_nothing_to_inherit_is_refused():
    with pytest.raises(ValueError, match='`distiller` is empty'):
        build(None, distiller=None)


def semi_supervised(coco, folder):
    """A config like mmdet's `soft-teacher_*`, written to a file."""
    plain = run_config(detector_config(), coco, folder / 'semi')
    labelled = plain.train_dataloader.dataset
    *pipeline, pack = labelled.pipeline
    branches = ('sup', 'unsup_teacher', 'unsup_student')

    def dataset(**pipelines):
        branched = dict(type='MultiBranch', branch_field=branches, **pipelines)
        return dict(labelled, pipeline=[*pipeline, branched])

    config = run_config(
        dict(
            type='SoftTeacher',
            detector=detector_config(),
            data_preprocessor=dict(
                type='MultiBranchDataPreprocessor',
                data_preprocessor=detector_config()['data_preprocessor'],
            ),
            semi_train_cfg=dict(freeze_teacher=True),
            semi_test_cfg=dict(predict_on='teacher'),
        ),
        coco,
        folder / 'semi',
        train_dataloader=dict(
            batch_size=2,
            num_workers=0,
            sampler=dict(
                type='GroupMultiSourceSampler',
                batch_size=2,
                source_ratio=[1, 1],
            ),
            dataset=dict(
                type='ConcatDataset',
                datasets=[
                    dataset(sup=[pack]),
                    dataset(unsup_teacher=[pack], unsup_student=[pack]),
                ],
            ),
        ),
        train_cfg=dict(type='IterBasedTrainLoop', max_iters=2, val_interval=2),
        val_cfg=dict(type='TeacherStudentValLoop'),
        custom_hooks=[dict(type='MeanTeacherHook')],
    )
    Config(config).dump(folder / 'semi.py')
    return labelled.to_dict()


def test_student__that_is_semi_supervised_trains_as_the_message_says(
    coco, tmp_path
):
    labelled = semi_supervised(coco, tmp_path)
    model = distillation_config(dict(type='era_mm.ERADistiller'))

    def config(student, **entries):
        text = (
            "_base_ = ['semi.py']\n"
            'model = dict(_delete_=True, type="era_mm.Distillation", '
            f'student={student}, teacher={model["teacher"]!r}, '
            f'distiller={model["distiller"]!r})\n'
            f'work_dir = {str(tmp_path / "run")!r}\n'
            f'experiment_name = {str(tmp_path)!r}.replace("/", "-")\n'
        )
        text += '\n'.join(f'{k} = {v}' for k, v in entries.items())
        (tmp_path / 'distilled.py').write_text(text + '\n')
        return Config.fromfile(tmp_path / 'distilled.py')

    with pytest.raises(ValueError, match='cannot be a student') as error:
        Runner.from_cfg(config('_base_.model'))
    changes = dict(
        val_cfg="dict(type='ValLoop')",
        custom_hooks='[]',
        train_dataloader=dict(
            _delete_=True,
            batch_size=2,
            num_workers=0,
            sampler=dict(type='DefaultSampler', shuffle=True),
            dataset=labelled,
        ),
    )
    for hint in (
        'student=_base_.model.detector',
        f'val_cfg={changes["val_cfg"]}',
        'MeanTeacherHook',
        'DefaultSampler',
        'MultiBranch',
    ):
        assert hint in str(error.value)
    runner = Runner.from_cfg(config('_base_.model.detector', **changes))
    runner.train()
    assert runner.iter == 2
    assert 'val/coco/bbox_mAP' in runner.message_hub.log_scalars
