"""Configs that make_config writes train at once, and bad input is said.

The pairs are mmdet's and mmpretrain's own configs, cut down in width.
"""

import errno
import io
import re
import shlex
from pathlib import Path

import pytest
import torch
from mmdet.apis import init_detector
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmpretrain.datasets import CIFAR10  # noqa: F401  # prints, once
from mmpretrain.structures import DataSample

from era_mm import cli
from era_mm.core import Distillation, Plan
from era_mm.engine import make_config
from era_mm.engine.host_configs import read_host_config
from era_mm.engine.make_config import LINE_LENGTH
from era_mm.methods.era import ERADistiller
from era_mm.testing import (
    detection_batch,
    detector_config,
    run_config,
    save_teacher,
)

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'


def build(config):
    init_default_scope(config.default_scope)
    model = config.model
    if 'data_preprocessor' in config:
        model.setdefault('data_preprocessor', config.data_preprocessor)
    model = MODELS.build(model)
    assert isinstance(model, Distillation)
    model.init_weights()
    return model


def images(num=2, size=224):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randint(
        0, 256, (num, 3, size, size), generator=generator
    ).byte()
    samples = [DataSample().set_gt_label(label) for label in range(num)]
    return dict(inputs=list(inputs), data_samples=samples)


def train_and_predict(model, batch):
    """Two steps, for the checks that look back at the first; one pass."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    for _ in range(2):
        data = model.data_preprocessor(batch(), True)
        losses = model(**data, mode='loss')
        loss, _ = model.parse_losses(losses)
        assert torch.isfinite(loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    data = model.data_preprocessor(batch(), False)
    with torch.no_grad():
        predictions = model(**data, mode='predict')
    assert len(predictions) == len(data['data_samples'])
    return losses


DETECTORS = {
    # student, teacher: student's levels, teacher's, scales, head reused
    ('retinanet', 'fcos'): (None, None, None, True),
    ('retinanet', 'faster_rcnn'): ([0, 1, 2, 3], [1, 2, 3, 4], None, False),
    ('retinanet', 'mask_rcnn_swin'): ([0, 1, 2, 3], [1, 2, 3, 4], None, False),
    ('retinanet_3_levels', 'retinanet'): (
        [0, 1, 2, 2, 2],
        None,
        [1, 1, 1, 0.5, 0.25],
        True,
    ),
    ('retinanet', 'retinanet_from_4'): (
        [0, 0, 1, 2],
        None,
        [2.0, 1, 1, 1],
        True,
    ),
    ('retinanet_from_4', 'retinanet_coarse'): (
        [3, 3, 3],
        None,
        [1, 0.5, 0.25],
        True,
    ),
    ('retinanet', 'retinanet_5_classes'): (None, None, None, False),
}


@pytest.mark.parametrize(('student', 'teacher'), DETECTORS)
def test_detectors__pair_by_stride_and_train(make, student, teacher):
    own, theirs, scales, is_reused = DETECTORS[student, teacher]
    config, printed = make(student, teacher)
    distiller = config.model.distiller
    resample = distiller.get('source', {}).get('resample', {})
    assert resample.get('student', {}).get('levels') == own
    assert resample.get('teacher', {}).get('levels') == theirs
    assert resample.get('student', {}).get('scales') == scales
    assert (distiller.get('twi_steps') == 'none') is not is_reused
    assert ('head       reused' in printed) is is_reused
    (hook,) = config.custom_hooks
    # It also tells which branches are idle.
    assert hook.type == 'era_mm.TWIHook'
    assert (hook.modes == ['S']) is not is_reused
    losses = train_and_predict(
        build(config), lambda: detection_batch(2, size=128)
    )
    assert any('twi' in key for key in losses) is is_reused
    assert losses['loss_era_align'] > 0


def test_detectors__of_other_padding_are_cut_to_what_both_have(make):
    config, printed = make('retinanet_3_levels', 'retinanet_unpadded')
    assert 'padded to multiples of 1 (student 32)' in printed
    model = build(config)
    # 100 pixels: the student pads to 128.
    losses = train_and_predict(model, lambda: detection_batch(2, size=100))
    assert losses['loss_era_align'] > 0


@pytest.mark.parametrize(
    'method',
    [
        'at',
        'crosskd',
        'cwd',
        'era',
        'feature_imitation',
        'ie_kd',
        'logit',
        'mgd',
        'pkd',
        'residual_kd',
        'reviewkd',
        'sokd',
    ],
)
def test_detectors__of_other_padding_train_by_every_method(make, method):
    """Nothing is resampled, and 100 pixels are padded to 128 or not."""
    config, printed = make(
        'retinanet', 'retinanet_unpadded', '--method', method
    )
    if method == 'at':
        # Alike on every level, however small its maps are.
        assert config.model.distiller.num_positions == 256
        assert config.model.distiller.loss_weight == 30
    if method == 'pkd':
        # Published for one-stage detectors.
        assert config.model.distiller == dict(
            type='era_mm.PKDDistiller', loss_weight=10.0
        )
    assert 'resampling none needed' in printed
    train_and_predict(build(config), lambda: detection_batch(2, size=100))


def test_detectors__only_the_shared_strides_without_the_head(make):
    config, printed = make('retinanet_3_levels', 'faster_rcnn')
    resample = config.model.distiller.source.resample
    assert 'student' not in resample
    assert resample.teacher == dict(levels=[1, 2, 3])
    assert (
        'without partner: teacher neck[0] (stride 4); teacher neck[4] '
        '(stride 64)' in printed
    )
    assert "the teacher's RoI head needs the student's proposals" in printed


CLASSIFIERS = {
    ('resnet', 'vit'): dict(
        source=dict(student='neck', teacher='backbone'),
        mbrnet=dict(norm_cfg=dict(type='LN')),
    ),
    ('resnet', 'swin'): dict(mbrnet=dict(norm_cfg=dict(type='LN'))),
    ('vit', 'resnet'): dict(source=dict(student='backbone', teacher='neck')),
}


@pytest.mark.parametrize(('student', 'teacher'), CLASSIFIERS)
def test_classifiers__pair_what_feeds_the_head_and_train(
    make, student, teacher
):
    config, _ = make(student, teacher)
    expected = dict(type='era_mm.ERADistiller') | CLASSIFIERS[student, teacher]
    assert config.model.distiller == expected
    losses = train_and_predict(build(config), images)
    assert losses['loss_era_twi_cls'] > 0
    assert losses['loss_era_logit'] > 0


def test_ie_kd__puts_the_tokens_of_a_vit_on_their_grid(make):
    config, _ = make('resnet', 'vit', '--method', 'ie_kd')
    assert config.model.distiller == dict(
        type='era_mm.IEKDDistiller',
        source=dict(
            student='backbone',
            teacher='backbone.ln1',
            resample=dict(
                student=dict(scales=[2.0]),
                teacher=dict(tokens='map', num_extra=1),
            ),
        ),
    )
    losses = train_and_predict(build(config), images)
    assert losses['loss_iekd_inherit'] > 0


@pytest.mark.parametrize(
    'method',
    ['at', 'cwd', 'feature_imitation', 'logit', 'mgd', 'pkd', 'reviewkd'],
)
def test_classifiers__train_by_the_baselines(make, method):
    config, printed = make('resnet', 'resnet_wide', '--method', method)
    if method in ('at', 'reviewkd'):
        stages = [f'backbone.layer{index}' for index in range(1, 5)]
        pooled = ['neck'] if method == 'reviewkd' else []
        assert config.model.distiller.source == stages + pooled
        assert f'student {" ".join(stages + pooled)}' in printed
        assert '[0] stride 4, 8 channels' in printed
        assert 'num_positions' not in config.model.distiller
    if method == 'mgd':
        assert config.model.distiller.mask == 'channels'
    losses = train_and_predict(build(config), images)
    assert len([key for key in losses if 'loss' in key]) == 2


RECIPES = {
    'logit': dict(label_weight=0.1),
    'kl': dict(label_weight=0.1),
    'dist': dict(logit=dict(kind='dist')),
    'dkd': dict(logit=dict(kind='dkd')),
    'lskd': dict(logit=dict(kind='kl', standardise=True), label_weight=0.1),
}


@pytest.mark.parametrize('method', RECIPES)
def test_recipes__of_logits_write_kind_and_weight_of_the_labels(make, method):
    config, printed = make('resnet', 'resnet_wide', '--method', method)
    settings = RECIPES[method]
    assert config.model.distiller == dict(
        type='era_mm.LogitDistiller', **settings
    )
    kind = settings.get('logit', {}).get('kind', 'kl')
    assert f'its outputs are distilled (LinearClsHead, {kind!r})' in printed
    weight = settings.get('label_weight', 1)
    assert ('the labels weigh 0.1' in printed) is (weight != 1)
    model = build(config)
    term = model.distillers['distiller'].term
    assert (term.kind, term.standardise) == (kind, method == 'lskd')
    published = dict(dist=(2, 4), dkd=(1, 4), lskd=(9, 2))
    assert (term.weight, term.temperature) == published.get(method, (0.9, 4))
    assert model.head.loss_module.loss_weight == weight
    losses = train_and_predict(model, images)
    assert losses['loss_logit_score'] > 0


def test_recipes__are_for_classifiers_and_logit_for_detectors(
    make, host, tmp_path, capsys
):
    config, _ = make('retinanet', 'retinanet_unpadded', '--method', 'logit')
    assert config.model.distiller == dict(type='era_mm.LogitDistiller')
    for method in ('kl', 'dist', 'dkd', 'lskd'):
        error = fails(
            capsys,
            *('--student', host('retinanet'), '--teacher', host('fcos')),
            *('--teacher-checkpoint', 'random', '--method', method),
            *('--out', str(tmp_path / 'o.py')),
        )
        assert f"'{method}' is for the logits of two classifiers" in error
        assert 'Take --method logit' in error


def test_recipes__go_with_other_methods_but_not_with_one_another(
    make, host, tmp_path, capsys
):
    config, _ = make(
        'resnet', 'resnet_wide', '--method', 'dkd', '--method', 'pkd'
    )
    assert config.model.distiller == dict(
        dkd=dict(type='era_mm.LogitDistiller', logit=dict(kind='dkd')),
        pkd=dict(type='era_mm.PKDDistiller', loss_weight=6.0),
    )
    losses = train_and_predict(build(config), images)
    assert {'dkd.loss_logit_score', 'pkd.loss_imitation'} <= set(losses)
    error = fails(
        capsys,
        *('--student', host('resnet'), '--teacher', host('resnet_wide')),
        *('--teacher-checkpoint', 'random', '--out', str(tmp_path / 'o.py')),
        *('--method', 'dkd', '--method', 'dist'),
    )
    assert 'dkd and dist are both settings of era_mm.LogitDistiller' in error


@pytest.mark.parametrize('method', make_config.MUTUAL)
def test_methods__of_two_students_name_a_config_to_copy(refused, method):
    error = refused(method=method)
    assert 'has two students that teach each other' in error
    for name in make_config.MUTUAL[method]:
        assert name in error
        (file,) = CONFIGS.rglob(f'{name}.py')
        model = Config.fromfile(file).model
        assert model.type == 'era_mm.MutualDistillation'


def test_pkd__has_the_weight_of_two_stages(make):
    config, _ = make('faster_rcnn', 'mask_rcnn_swin', '--method', 'pkd')
    assert config.model.distiller == dict(
        type='era_mm.PKDDistiller', loss_weight=6.0
    )


def test_simkd__puts_the_teachers_classifier_into_the_student(
    make, host, tmp_path, capsys
):
    config, _ = make('resnet', 'resnet_wide', '--method', 'simkd')
    assert config.model.distiller == dict(
        type='era_mm.SimKDDistiller', channels=[64, 128]
    )
    assert config.model.inherit == ['head']
    losses = train_and_predict(build(config), images)
    assert [key for key in losses if 'loss' in key] == ['loss_simkd']
    for student, teacher, message in (
        ('retinanet', 'fcos', 'it is for classifiers'),
        ('resnet', 'vit', 'does not pool maps'),
    ):
        error = fails(
            capsys,
            *('--student', host(student), '--teacher', host(teacher)),
            *('--teacher-checkpoint', 'random', '--method', 'simkd'),
            *('--out', str(tmp_path / 'o.py')),
        )
        assert message in error


def test_printed_command__can_be_pasted_where_the_path_has_a_space(
    host, tmp_path, capsys
):
    out = tmp_path / 'my runs' / 'pair.py'
    status = cli.run_make_config(
        [
            *('--student', host('resnet'), '--teacher', host('resnet_wide')),
            *('--teacher-checkpoint', 'random', '--method', 'at'),
            *('--out', str(out)),
        ]
    )
    printed = capsys.readouterr()
    assert status == 0, printed.err
    command = printed.out.splitlines()[-1]
    assert shlex.split(command) == ['mim', 'train', 'era_mm', str(out)]


def test_stages__are_asked_for_by_hand_where_there_are_none(
    host, tmp_path, capsys
):
    error = fails(
        capsys,
        *('--student', host('resnet'), '--teacher', host('vit')),
        *('--teacher-checkpoint', 'random', '--method', 'at'),
        *('--out', str(tmp_path / 'o.py')),
    )
    assert 'teacher: expected stages' in error
    assert 'Write the `source` by hand' in error


def test_logit_and_crosskd__say_which_pairs_they_cannot_have(
    host, tmp_path, capsys
):
    for method, teacher, message in (
        ('logit', 'faster_rcnn', "needs the student's proposals"),
        ('crosskd', 'faster_rcnn', 'has no dense head'),
    ):
        error = fails(
            capsys,
            *('--student', host('retinanet'), '--teacher', host(teacher)),
            *('--teacher-checkpoint', 'random', '--method', method),
            *('--out', str(tmp_path / 'o.py')),
        )
        assert message in error


def test_methods__several_teach_at_once(make, host, tmp_path, capsys):
    config, printed = make(
        'retinanet', 'fcos', '--method', 'era', '--method', 'cwd'
    )
    assert {k: v.type for k, v in config.model.distiller.items()} == dict(
        era='era_mm.ERADistiller', cwd='era_mm.CWDDistiller'
    )
    assert config.custom_hooks == [
        dict(type='era_mm.TWIHook', modes=['era.E0', 'era.T', 'era.ST'])
    ]
    lines = printed.splitlines()
    assert [x for x in lines if x.startswith('method')] == [
        'method     era',
        'method     cwd',
    ]
    model = build(config)
    model.check_modes(config.custom_hooks[0].modes)
    losses = train_and_predict(model, lambda: detection_batch(2, size=128))
    assert {'era.loss_era_align', 'cwd.loss_cwd'} <= set(losses)
    error = fails(
        capsys,
        *('--student', host('retinanet'), '--teacher', host('fcos')),
        *('--teacher-checkpoint', 'random', '--out', str(tmp_path / 'o.py')),
        *('--method', 'cwd', '--method', 'cwd'),
    )
    assert 'expected each method once' in error


def test_residual_kd__trains_or_says_which_levels_are_alone(
    make, host, tmp_path, capsys
):
    config, _ = make('retinanet', 'fcos', '--method', 'residual_kd')
    train_and_predict(build(config), lambda: detection_batch(2, size=128))
    error = fails(
        capsys,
        *('--student', host('retinanet'), '--teacher', host('faster_rcnn')),
        *('--teacher-checkpoint', 'random', '--method', 'residual_kd'),
        *('--out', str(tmp_path / 'o.py')),
    )
    assert 'same levels and strides' in error
    assert 'student neck[4] (stride 128)' in error


# -- the file -----------------------------------------------------------------


def test_text__keeps_the_students_hooks_and_imports(host, tmp_path, capsys):
    student = Path(host('retinanet'))
    student.write_text(
        student.read_text()
        + "custom_imports = dict(imports=['mmdet.models'])\n"
        + "custom_hooks = [dict(type='NumClassCheckHook')]\n"
    )
    out = tmp_path / 'deep' / 'er' / 'out.py'
    status = cli.run_make_config(
        [
            *('--student', str(student), '--teacher', host('fcos')),
            *('--teacher-checkpoint', 'random', '--out', str(out)),
            *('--student-checkpoint', 'https://example.org/student.pth'),
        ]
    )
    assert status == 0, capsys.readouterr().err
    config = Config.fromfile(out)
    assert [hook.type for hook in config.custom_hooks] == [
        'NumClassCheckHook',
        'era_mm.TWIHook',
    ]
    assert config.custom_hooks[1].modes == ['E0', 'T', 'ST']
    assert config.custom_imports.imports == ['mmdet.models', 'era_mm']
    assert config.load_from == 'https://example.org/student.pth'
    assert "_base_ = '../../own/retinanet.py'" in out.read_text()
    plain = Config.fromfile(student)
    assert config.model.student == plain.model
    for key in plain:
        if key not in ('model', 'custom_hooks', 'custom_imports', 'load_from'):
            assert config[key] == plain[key], key
    assert [path.name for path in out.parent.iterdir()] == ['out.py']
    for line in out.read_text().splitlines():
        assert len(line) <= LINE_LENGTH or '://' in line or '/' in line


def test_modes__are_not_reported_without_the_blend(make):
    config, _ = make('retinanet_3_levels', 'retinanet')
    # The student's own head does not read the resized levels.
    assert config.custom_hooks == [
        dict(type='era_mm.TWIHook', modes=['E0', 'T'])
    ]


def test_modes__are_reported_by_the_hook_that_the_method_plans(
    make, monkeypatch
):
    planned = ERADistiller.plan_for

    def plan_for(pair):
        default = Plan._field_defaults['hook']
        return planned(pair)._replace(modes=('E0',), hook=default)

    monkeypatch.setattr(ERADistiller, 'plan_for', plan_for)
    config, _ = make('retinanet', 'fcos')
    assert config.custom_hooks == [dict(type='era_mm.ModesHook', modes=['E0'])]


def test_classes__of_other_names_leave_the_head_alone(host, tmp_path, capsys):
    student = Path(host('retinanet'))
    student.write_text(
        student.read_text()
        + 'train_dataloader = dict(dataset=dict(metainfo=dict('
        + "classes=('person', 'kite', 'own'))))\n"
    )
    teacher = Path(host('fcos'))
    teacher.write_text(
        teacher.read_text()
        + 'train_dataloader = dict(dataset=dict(metainfo=dict('
        + "classes=('kite', 'person', 'book'))))\n"
    )
    out = tmp_path / 'out.py'
    status = cli.run_make_config(
        [
            *('--student', str(student), '--teacher', str(teacher)),
            *('--teacher-checkpoint', 'random', '--out', str(out)),
        ]
    )
    printed = capsys.readouterr()
    assert status == 0, printed.err
    assert '3 and 3, 2 of them in both' in printed.out
    assert 'but other ones or another order' in printed.out
    config = Config.fromfile(out)
    assert config.model.distiller.twi_steps == 'none'
    hook = dict(type='era_mm.TWIHook', modes=['S'])
    assert config.custom_hooks == [hook]


def test_classes__of_a_classifiers_data_set_are_its_own(
    host, tmp_path, capsys
):
    for name, classes in (
        ('resnet', "'a', 'b', 'c'"),
        ('vit', "'c', 'b', 'a'"),
    ):
        config = Path(host(name))
        config.write_text(
            config.read_text()
            + f'train_dataloader = dict(dataset=dict(classes=[{classes}]))\n'
        )
    out = tmp_path / 'out.py'
    own = str(tmp_path / 'own')
    status = cli.run_make_config(
        [
            *('--student', f'{own}/resnet.py', '--teacher', f'{own}/vit.py'),
            *('--teacher-checkpoint', 'random', '--out', str(out)),
        ]
    )
    printed = capsys.readouterr()
    assert status == 0, printed.err
    assert 'classes    3 and 3, 3 of them in both' in printed.out
    assert 'but other ones or another order' in printed.out
    config = Config.fromfile(out)
    assert config.model.distiller.twi_steps == 'none'
    # In the released form there are no shares to tell.
    assert 'custom_hooks' not in config
    # For people.
    assert 'channels reversed no (student yes), mean none (' in printed.out


def test_text__leaves_what_the_plain_run_wrote_alone(host, tmp_path, capsys):
    """The config that mmengine keeps of a run names its work dir."""
    student = Path(host('retinanet'))
    student.write_text(
        student.read_text()
        + "work_dir = 'work_dirs/plain'\n"
        + "resume = True\nload_from = 'work_dirs/plain/epoch_3.pth'\n"
    )
    out = tmp_path / 'out.py'
    arguments = [
        *('--student', str(student), '--teacher', host('fcos')),
        *('--teacher-checkpoint', 'random', '--out', str(out)),
    ]
    assert cli.run_make_config(arguments) == 0
    printed = capsys.readouterr().out
    assert 'work_dir and resume not taken from the student' in printed
    config = Config.fromfile(out)
    assert config.work_dir == './work_dirs/out'
    assert config.resume is False
    assert config.load_from is None


@pytest.mark.smoke
def test_train__runs_the_file_at_once(tmp_path, coco, monkeypatch, capsys):
    """The whole way: two configs and a checkpoint, then mim's entry."""
    monkeypatch.chdir(tmp_path)
    for name, model in (
        ('student', detector_config(head='FCOSHead')),
        ('teacher', detector_config(width=16, channels=24)),
    ):
        config = run_config(
            model,
            coco,
            'work',
            train_cfg=dict(by_epoch=True, max_epochs=1, val_interval=1),
        )
        Config(config).dump(f'{name}.py')
    save_teacher(model, 'teacher.pth')
    arguments = ['--student', 'student.py', '--teacher', 'teacher.py']
    arguments += ['--teacher-checkpoint', 'teacher.pth', '--out', 'era.py']
    assert cli.run_make_config(arguments) == 0, capsys.readouterr().err
    assert cli.run_train(['era.py']) == 0, capsys.readouterr().err
    # The student's own config has another folder, for the plain run.
    assert not Path('work').exists()
    file = 'work_dirs/era/epoch_1.pth'
    plain = init_detector('student.py', file, device='cpu')
    state = torch.load(file, weights_only=False)['state_dict']
    assert set(state) == set(plain.state_dict())


# -- bad input ----------------------------------------------------------------


def fails(capsys, *args):
    """The one message of a command that fails."""
    capsys.readouterr()
    assert cli.run_make_config(list(args)) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith('\nerror: ')
    assert 'Traceback' not in printed.err
    assert not printed.out
    return re.sub(r'\s+', ' ', printed.err)


@pytest.fixture
def refused(host, tmp_path, capsys, monkeypatch):
    """Runs the command with changed arguments; nothing may be written."""
    # What ERA says of a pair goes to a log that writes where the first test
    # captured its output, which is closed by now.
    monkeypatch.setattr(
        'era_mm.methods.era.distiller.print_log', lambda *_, **__: None
    )

    def run(**changes):
        arguments = dict(
            student=host('retinanet'),
            teacher=host('fcos'),
            teacher_checkpoint='random',
            out=str(tmp_path / 'out' / 'out.py'),
        )
        arguments |= changes
        before = sorted(tmp_path.rglob('*'))
        error = fails(
            capsys,
            *(
                part
                for key, value in arguments.items()
                if value is not None
                for part in (f'--{key.replace("_", "-")}', value)
            ),
        )
        assert sorted(tmp_path.rglob('*')) == before
        return error

    return run


def test_refused__names_that_do_not_resolve(refused):
    error = refused(student='mmdet::retinanet/retinanet_r50_fpn_1x.py')
    assert '--student' in error
    assert 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py' in error
    error = refused(teacher='mmdet::retinanet_r101_fpn_2x_coco')
    assert 'mmdet::retinanet/retinanet_r101_fpn_2x_coco.py' in error
    error = refused(teacher='mmdt::retinanet/retinanet_r50_fpn_1x_coco.py')
    assert 'Did you mean mmdet::retinanet' in error
    error = refused(teacher='own/none.py')
    assert '--teacher: expected the path or the base name' in error
    assert "'own/none.py' is neither" in error
    error = refused(teacher='mmdet:retinanet/retinanet_r50_fpn_1x_coco.py')
    assert 'is written mmdet::retinanet/retinanet_r50_fpn_1x_coco.py' in error


def test_refused__a_typo_shows_the_files_beside(refused, host):
    near = host('retinanet')
    error = refused(student=near.replace('net.py', 'nett.py'))
    assert '--student: expected' in error
    assert f'Nearest names: {near}' in error
    error = refused(student=str(Path(near).parent))
    assert 'is a folder. Looked in' in error
    assert near in error


def test_refused__configs_that_do_not_build(refused, tmp_path):
    broken = tmp_path / 'broken.py'
    broken.write_text('model = dict(\n')
    assert 'cannot be read: SyntaxError' in refused(teacher=str(broken))
    broken.write_text("model = dict(type='NoSuchDetector')\n")
    error = refused(teacher=str(broken))
    assert 'cannot be built' in error
    assert 'NoSuchDetector' in error
    broken.write_text('optim_wrapper = dict()\n')
    assert 'has no `model`' in refused(teacher=str(broken))


def test_refused__a_detector_with_a_classifier(refused, host):
    error = refused(teacher=host('resnet'))
    assert 'is a detector, but the teacher' in error


def test_refused__a_model_that_is_neither(refused):
    error = refused(
        teacher='mmpretrain::mae/mae_vit-base-p16_8xb512-amp-'
        'coslr-300e_in1k.py'
    )
    assert 'expected a detector of mmdet or a classifier' in error


def test_refused__a_student_that_trains_on_more_than_it_predicts_from(
    refused, host, tmp_path
):
    # TridentNet's three branches, one of which stays at inference.
    base = 'mmdet::tridentnet/tridentnet_r50-caffe_1x_coco.py'
    path = tmp_path / 'trident.py'
    path.write_text(
        f'_base_ = {str(read_host_config(base).path)!r}\n'
        'model = dict(backbone=dict(init_cfg=None))\n'
    )
    error = refused(student=str(path), teacher=host('retinanet'))
    assert "expected 'backbone'" in error
    assert '[(2, 1024, 16, 16)] for two images' in error
    assert 'got [(6, 1024, 16, 16)]' in error


def test_refused__the_students_own_file(refused, host, tmp_path):
    error = refused(teacher=host('retinanet'))
    assert "is the student's own config" in error
    link = tmp_path / 'link.py'
    link.symlink_to(host('retinanet'))
    assert "is the student's own config" in refused(teacher=str(link))


def test_refused__a_distillation(refused):
    error = refused(student=str(CONFIGS / 'era_retinanet_r101_r50.py'))
    assert '--student' in error
    assert 'is already a Distillation' in error
    error = refused(teacher=str(CONFIGS / 'era_retinanet_r101_r50.py'))
    assert '--teacher' in error
    assert 'is a Distillation' in error
    error = refused(student=str(CONFIGS / 'ie_kd/ie_dml_retinanet_r50_r50.py'))
    assert 'is already a MutualDistillation' in error


def test_refused__a_student_without_data(refused, tmp_path):
    bare = tmp_path / 'bare.py'
    bare.write_text("_base_ = 'mmdet::_base_/models/retinanet_r50_fpn.py'\n")
    assert 'has no train_dataloader, train_cfg' in refused(student=str(bare))


def test_refused__a_student_of_the_new_style(refused, tmp_path):
    lazy = tmp_path / 'lazy.py'
    lazy.write_text(
        'from mmdet.models import RetinaNet\nmodel = dict(type=RetinaNet)\n'
    )
    assert 'of the new style' in refused(student=str(lazy))


def test_refused__an_out_that_exists_or_is_no_config(
    refused, tmp_path, monkeypatch
):
    taken = tmp_path / 'taken.py'
    taken.write_text('# mine')
    assert 'exists already' in refused(out=str(taken))
    assert taken.read_text() == '# mine'
    assert 'ends in .py' in refused(out=str(tmp_path / 'out.yaml'))
    error = refused(out=str(taken / 'deep' / 'out.py'))
    assert f'{taken} is a file' in error
    # As root everything is allowed.
    monkeypatch.setattr(make_config.os, 'access', lambda *args: False)
    assert f'written to, but {tmp_path} cannot' in refused()


def test_written__whole_or_not_at_all(refused, monkeypatch, tmp_path):
    """A full disk."""

    class Full(io.FileIO):
        def flush(self):
            raise OSError(errno.ENOSPC, 'No space left on device')

        def write(self, text):
            return super().write(text.encode())

    monkeypatch.setattr(
        make_config,
        'open',
        lambda file, mode, **kwargs: Full(file, mode),
        raising=False,
    )
    (tmp_path / 'out').mkdir()
    assert 'No space left on device' in refused()


def test_refused__an_unknown_method(refused):
    error = refused(method='erra')
    for name in ('era', 'ie_kd', 'residual_kd'):
        assert name in error
    # It has no teacher.
    assert 'trunk_to_branch' not in error


def test_refused__a_teacher_without_weights(refused, tmp_path):
    error = refused(teacher_checkpoint=None)
    assert '--teacher-checkpoint: expected the weights of' in error
    none = str(tmp_path / 'none.pth')
    error = refused(teacher_checkpoint=none)
    assert (
        f'--teacher-checkpoint: expected a whole checkpoint file, but there '
        f'is no file {none}' in error
    )
    error = refused(student_checkpoint=none)
    assert '--student-checkpoint: expected a whole checkpoint' in error
    error = refused(student_checkpoint='random')
    assert 'start from random' in error


def test_refused__weights_of_another_model(refused, host, tmp_path):
    file = tmp_path / 'retinanet.pth'
    config = Config.fromfile(host('retinanet'))
    save_teacher(config.model, file)
    error = refused(teacher_checkpoint=str(file))
    assert '--teacher-checkpoint: The weights in' in error
    assert 'do not fit FCOS' in error
    error = refused(teacher_checkpoint=str(file), student_checkpoint=str(file))
    assert "is the student's own file" in error
    url = 'https://example.org/t.pth'
    error = refused(teacher_checkpoint=url, student_checkpoint=url)
    assert "is the student's own file" in error
