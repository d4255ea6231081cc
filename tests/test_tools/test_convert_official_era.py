"""Files of the released code: converted, loaded strictly, computed again."""

import importlib.util
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import load_checkpoint
from mmpretrain.structures import DataSample
from torch.nn.functional import batch_norm, conv2d, linear, max_pool2d, prelu

from era_mm.core import extras_of
from era_mm.testing import classifier_config, save_teacher

TOOL = Path(__file__).parents[2] / 'tools' / 'convert_official_era.py'
CLASSES = 5
R18 = (2, 2, 2, 2)
R50 = (3, 4, 6, 3)


@pytest.fixture(scope='module')
def tool():
    spec = importlib.util.spec_from_file_location('convert', TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(tool, monkeypatch):
    def convert(source, target):
        monkeypatch.setattr(sys, 'argv', ['x', str(source), str(target)])
        tool.main()

    return convert


# -- what the released code writes, era.md sections 1 and 2 -------------------


class Weights(dict):
    """A random state dict, layer by layer."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)

    def random(self, *shape):
        return torch.randn(*shape, generator=self.generator)

    def conv(self, name, out, into, size):
        scale = (into * size * size) ** -0.5
        self[f'{name}.weight'] = scale * self.random(out, into, size, size)

    def linear(self, name, out, into):
        self[f'{name}.weight'] = into**-0.5 * self.random(out, into)
        self[f'{name}.bias'] = self.random(out)

    def norm(self, name, channels):
        self[f'{name}.weight'] = 1 + 0.1 * self.random(channels)
        self[f'{name}.bias'] = 0.1 * self.random(channels)
        self[f'{name}.running_mean'] = 0.1 * self.random(channels)
        self[f'{name}.running_var'] = 1 + self.random(channels).abs()
        self[f'{name}.num_batches_tracked'] = torch.tensor(7)


def resnet(blocks, bottleneck, width, up, seed=0):
    """Names and shapes of torchvision's ResNet, and `up_fc`."""
    weights = Weights(seed)
    expansion = 4 if bottleneck else 1
    weights.conv('conv1', width, 3, 7)
    weights.norm('bn1', width)
    into = width
    for layer, count in enumerate(blocks, start=1):
        middle = width * 2 ** (layer - 1)
        for block in range(count):
            name = f'layer{layer}.{block}'
            out = middle * expansion
            sizes = (1, 3, 1) if bottleneck else (3, 3)
            channels = [into, *[middle] * (len(sizes) - 1), out]
            for i, size in enumerate(sizes):
                weights.conv(
                    f'{name}.conv{i + 1}', channels[i + 1], channels[i], size
                )
                weights.norm(f'{name}.bn{i + 1}', channels[i + 1])
            if block == 0 and (layer > 1 or into != out):
                weights.conv(f'{name}.downsample.0', out, into, 1)
                weights.norm(f'{name}.downsample.1', out)
            into = out
    weights.linear('fc', CLASSES, into)
    weights.linear('up_fc', up, into)
    return weights


def gap_model(channels, out, branches, blocks, shared, act='relu'):
    weights = Weights(1)
    if channels != out:
        for i in range(1 if shared else branches):
            weights.linear(f'up_fc_list.{i}', out, channels)
    for i in range(branches):
        for k in range(blocks):
            name = f'pred_res_list.{i}.{k}.block'
            weights.linear(f'{name}.0', channels, channels)
            weights.norm(f'{name}.1', channels)
            if act == 'prelu' and k < blocks - 1:
                weights[f'{name}.2.weight'] = torch.tensor([0.1 * (i + k + 1)])
    return weights


def official(
    blocks=R18,
    bottleneck=False,
    width=8,
    out=128,
    branches=3,
    num_blocks=2,
    shared=False,
    act='relu',
):
    """The dict that the released code saves."""
    channels = width * 8 * (4 if bottleneck else 1)
    head = Weights(2)
    head.linear('fc', CLASSES, out)
    return {
        'epoch': 93,
        'model': OrderedDict(resnet(blocks, bottleneck, width, out)),
        'gap_model': OrderedDict(
            gap_model(channels, out, branches, num_blocks, shared, act)
        ),
        'ema_model': None,
        'ema_model_gap': None,
        'optimizer': {'state': {}, 'param_groups': [{'lr': 0.1}]},
        'optimizer_gap': {'state': {}, 'param_groups': [{'lr': 0.1}]},
        'teacher_head': OrderedDict(
            (key.removeprefix('fc.'), value) for key, value in head.items()
        ),
        'scaler': None,
        'scaler_gap': None,
        'dyrep': None,
    }


def save(checkpoint, file):
    torch.save(checkpoint, file)
    return file


# -- the plain re-computation -------------------------------------------------


def recompute_feature(w, x):
    """A torchvision ResNet in eval mode, up to its pooled feature."""

    def norm(name, x):
        return batch_norm(
            x,
            *(
                w[f'{name}.{k}']
                for k in ('running_mean', 'running_var', 'weight', 'bias')
            ),
        )

    x = norm('bn1', conv2d(x, w['conv1.weight'], stride=2, padding=3)).relu()
    x = max_pool2d(x, 3, stride=2, padding=1)
    for layer in range(1, 5):
        block = 0
        while (name := f'layer{layer}.{block}') + '.conv1.weight' in w:
            stride = 2 if layer > 1 and block == 0 else 1
            strided = 2 if f'{name}.conv3.weight' in w else 1
            y, i = x, 1
            while f'{name}.conv{i}.weight' in w:
                kernel = w[f'{name}.conv{i}.weight']
                y = conv2d(
                    y if i == 1 else y.relu(),
                    kernel,
                    stride=stride if i == strided else 1,
                    padding=kernel.shape[-1] // 2,
                )
                y, i = norm(f'{name}.bn{i}', y), i + 1
            if f'{name}.downsample.0.weight' in w:
                x = conv2d(x, w[f'{name}.downsample.0.weight'], stride=stride)
                x = norm(f'{name}.downsample.1', x)
            x, block = (x + y).relu(), block + 1
    return x.mean((2, 3))


def recompute(checkpoint, feature, alpha, accumulated=False, final='acc'):
    """era.md 1.6: z(a) = (1 - a) z_s + a H_t(u + sum_i d_i)."""
    model, gap, head = (
        {k: v.double() for k, v in checkpoint[part].items()}
        for part in ('model', 'gap_model', 'teacher_head')
    )

    def fc(w, name, x):
        return linear(x, w[f'{name}.weight'], w[f'{name}.bias'])

    hidden = []
    while (
        f'{(branch := f"pred_res_list.{len(hidden)}")}.0.block.0.bias' in gap
    ):
        x = feature + sum(hidden) if accumulated else feature
        k = 0
        while (name := f'{branch}.{k}.block') + '.0.bias' in gap:
            if k:
                relu = torch.zeros(1).double()
                x = prelu(x, gap.get(f'{branch}.{k - 1}.block.2.weight', relu))
            x = fc(gap, f'{name}.0', x)
            x = x - gap[f'{name}.1.running_mean']
            x = x / (gap[f'{name}.1.running_var'] + 1e-5).sqrt()
            x = x * gap[f'{name}.1.weight'] + gap[f'{name}.1.bias']
            k += 1
        hidden.append(x)
    residuals = []
    for i, x in enumerate(hidden):
        if 'up_fc_list.0.weight' in gap:
            own = f'up_fc_list.{i}.weight' in gap
            x = fc(gap, f'up_fc_list.{i if own else 0}', x)
        residuals.append(x)
    total = torch.stack(residuals)
    total = total.sum(0) if final == 'acc' else total.mean(0)
    estimate = fc(model, 'up_fc', feature) + total
    z_t = linear(estimate, head['weight'], head['bias'])
    return (1 - alpha) * fc(model, 'fc', feature) + alpha * z_t


# -- our model ----------------------------------------------------------------


def build(config, settings, teacher_width, checkpoint='random', **kwargs):
    init_default_scope('mmpretrain')
    model = MODELS.build(
        dict(
            type='era_mm.Distillation',
            student=config,
            teacher=dict(
                config=classifier_config(teacher_width, CLASSES),
                checkpoint=checkpoint,
            ),
            distiller=dict(
                type='era_mm.ERADistiller', mbrnet=settings, **kwargs
            ),
        )
    )
    return model.eval()


def logits(model, inputs, alpha):
    """Logits of a blend, from the parts of our model."""
    feats = model.student.extract_feat(inputs)
    era = model.distillers['distiller']
    z_t = era.twi_head(era.mbrnet(feats))
    return (1 - alpha) * model.student.head(feats) + alpha * z_t


def check_logits(model, checkpoint, inputs, feature, **kwargs):
    model = model.double()
    for alpha in (0.0, 0.5, 1.0):
        expected = recompute(checkpoint, feature, alpha, **kwargs)
        found = logits(model, inputs, alpha)
        assert expected.abs().max() > 0.1
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        # And the modes as a user gets them.
        model.distillers['distiller'].alpha = alpha
        model.active_modes = ('T', 'ST')
        own = model(inputs, [DataSample() for _ in inputs], mode='predict')
        scores = {'S': own, **model.mode_predictions}
        mode = {0.0: 'S', 0.5: 'ST', 1.0: 'T'}[alpha]
        for name in {mode, 'ST'}:
            found = torch.stack([s.pred_score for s in scores[name]])
            torch.testing.assert_close(
                found, expected.softmax(1), rtol=1e-5, atol=1e-6
            )


INPUTS = torch.randn(
    2,
    3,
    32,
    32,
    dtype=torch.float64,
    generator=torch.Generator().manual_seed(9),
)

LAYOUTS = [
    # Other widths with a projection each and one for all; equal widths.
    (dict(), {}),
    (dict(shared=True), dict(share_projection=True)),
    (dict(out=64), {}),
    (dict(branches=1, num_blocks=1), {}),
    (dict(num_blocks=3, act='prelu'), dict(act_cfg=dict(type='PReLU'))),
    (dict(blocks=R50, bottleneck=True, width=4, out=64, branches=2), {}),
    (dict(blocks=R50, out=64, branches=2), {}),
]


@torch.no_grad()
@pytest.mark.parametrize(('changes', 'extra'), LAYOUTS)
def test_convert__loads_strictly_and_gives_the_same_logits(
    tool, run, tmp_path, changes, extra
):
    checkpoint = official(**changes)
    source = save(checkpoint, tmp_path / 'checkpoint-93.pth.tar')
    run(source, tmp_path / 'era.pth')
    config, settings, _ = tool.convert(source)
    assert settings == extra | dict(
        num_branches=changes.get('branches', 3),
        num_blocks=changes.get('num_blocks', 2),
    )
    assert config['backbone']['depth'] == (
        18
        if 'blocks' not in changes
        else 50
        if changes.get('bottleneck')
        else 34
    )
    model = build(config, settings, changes.get('out', 128) // 8)
    load_checkpoint(model, str(tmp_path / 'era.pth'), strict=True)
    feature = recompute_feature(
        {k: v.double() for k, v in checkpoint['model'].items()}, INPUTS
    )
    check_logits(model, checkpoint, INPUTS, feature)


@torch.no_grad()
def test_convert__what_the_file_does_not_say_is_the_users(tool, run, tmp_path):
    # The same weights under isAccuX=1 and final_out_type=avg.
    checkpoint = official(shared=True)
    source = save(checkpoint, tmp_path / 'in.pth')
    run(source, tmp_path / 'out.pth')
    config, settings, _ = tool.convert(source)
    settings |= dict(topology='accumulated', reduction='mean')
    model = build(config, settings, 16)
    load_checkpoint(model, str(tmp_path / 'out.pth'), strict=True)
    feature = recompute_feature(
        {k: v.double() for k, v in checkpoint['model'].items()}, INPUTS
    )
    check_logits(
        model, checkpoint, INPUTS, feature, accumulated=True, final='avg'
    )


@torch.no_grad()
def test_convert__torchvisions_own_resnet(tool, tmp_path):
    torchvision = pytest.importorskip('torchvision')
    net = torchvision.models.resnet18(num_classes=CLASSES).eval()
    net.up_fc = torch.nn.Linear(512, 128)
    checkpoint = official() | {
        'model': net.state_dict(),
        'gap_model': dict(gap_model(512, 128, 2, 2, shared=False)),
    }
    source = save(checkpoint, tmp_path / 'in.pth')
    config, settings, converted = tool.convert(source)
    torch.save(converted, tmp_path / 'out.pth')
    model = build(config, settings, 16)
    load_checkpoint(model, str(tmp_path / 'out.pth'), strict=True)
    net.fc = torch.nn.Identity()
    feature = net.double()(INPUTS)
    check_logits(model, checkpoint, INPUTS, feature)


def test_convert__the_student_is_a_plain_checkpoint(tool, tmp_path):
    config, _, converted = tool.convert(save(official(), tmp_path / 'in.pth'))
    torch.save(converted, tmp_path / 'out.pth')
    init_default_scope('mmpretrain')
    student = MODELS.build(config)
    load_checkpoint(student, str(tmp_path / 'out.pth'), strict=True)
    assert set(converted['state_dict']) == set(student.state_dict())
    assert set(extras_of(converted['state_dict'])) == {'distiller'}


# -- the teacher's head in the file -------------------------------------------


def with_teacher(tool, tmp_path, change=0.0):
    """Our model with a teacher file whose head is the file's, or is not."""
    checkpoint = official()
    source = save(checkpoint, tmp_path / 'in.pth')
    config, settings, converted = tool.convert(source)
    torch.save(converted, tmp_path / 'out.pth')
    file = save_teacher(
        classifier_config(16, CLASSES), tmp_path / 't.pth', scope='mmpretrain'
    )
    teacher = torch.load(file, weights_only=False)
    for key, value in checkpoint['teacher_head'].items():
        teacher['state_dict'][f'head.fc.{key}'] = value + change
    torch.save(teacher, file)
    model = build(config, settings, 16, checkpoint=file)
    return model, str(tmp_path / 'out.pth'), checkpoint


@torch.no_grad()
@pytest.mark.parametrize('teacher_first', [False, True])
def test_teacher__with_that_head_is_accepted(tool, tmp_path, teacher_first):
    model, file, checkpoint = with_teacher(tool, tmp_path)
    if teacher_first:
        model.load_teachers()
    load_checkpoint(model, file, strict=True)
    feature = recompute_feature(
        {k: v.double() for k, v in checkpoint['model'].items()}, INPUTS
    )
    check_logits(model, checkpoint, INPUTS, feature)
    assert model.teachers['teacher'].is_loaded


@pytest.mark.parametrize('teacher_first', [False, True])
def test_teacher__with_another_head_is_refused(tool, tmp_path, teacher_first):
    model, file, _ = with_teacher(tool, tmp_path, change=1e-3)
    message = "trained with another teacher: 'head.fc.weight' differs"
    if teacher_first:
        model.load_teachers()
        with pytest.raises(ValueError, match=message):
            load_checkpoint(model, file, strict=True)
    else:
        # The student alone needs no teacher.
        load_checkpoint(model, file, strict=True)
        samples = [DataSample() for _ in INPUTS]
        model(INPUTS.float(), samples, mode='predict')
        model.active_modes = ('T',)
        with pytest.raises(ValueError, match=message):
            model(INPUTS.float(), samples, mode='predict')


def test_teacher__random_keeps_its_fingerprint_after_taking_the_head(
    tool, tmp_path
):
    config, settings, converted = tool.convert(
        save(official(), tmp_path / 'in.pth')
    )
    model = build(config, settings, 16)
    teacher = model.teachers['teacher']
    model.load_teachers()
    before = teacher.loaded_fingerprint
    torch.save(converted, tmp_path / 'out.pth')
    load_checkpoint(model, str(tmp_path / 'out.pth'), strict=True)
    assert teacher.loaded_fingerprint == teacher.fingerprint() != before


def test_teacher__head_stays_in_the_files_that_follow(tool, tmp_path):
    config, settings, converted = tool.convert(
        save(official(), tmp_path / 'in.pth')
    )
    torch.save(converted, tmp_path / 'out.pth')
    first, second = build(config, settings, 16), build(config, settings, 16)
    load_checkpoint(first, str(tmp_path / 'out.pth'), strict=True)
    torch.save(first.state_dict(), tmp_path / 'again.pth')
    load_checkpoint(second, str(tmp_path / 'again.pth'), strict=True)
    inputs = INPUTS.float()
    found = []
    for model in (first, second):
        model.load_teachers()
        with torch.no_grad():
            found.append(logits(model, inputs, 1.0))
    assert torch.equal(*found)


def test_teacher__without_such_a_head_is_refused(tool, tmp_path):
    config, settings, converted = tool.convert(
        save(official(), tmp_path / 'in.pth')
    )
    torch.save(converted, tmp_path / 'out.pth')
    model = build(config, settings, 16)
    model.teachers['teacher'].model.head.fc = torch.nn.Linear(128, 7)
    load_checkpoint(model, str(tmp_path / 'out.pth'), strict=True)
    with pytest.raises(ValueError, match=r'\(5, 128\).*has \(7, 128\)'):
        model.load_teachers()


@torch.no_grad()
def test_teacher__gives_the_head_that_a_stripped_file_lacks(
    tool, run, tmp_path, capsys
):
    checkpoint = official()
    head = checkpoint.pop('teacher_head')
    source = save(checkpoint, tmp_path / 'in.pth')
    run(source, tmp_path / 'out.pth')
    assert "not 'random'" in capsys.readouterr().out
    config, settings, _ = tool.convert(source)
    file = save_teacher(
        classifier_config(16, CLASSES), tmp_path / 't.pth', scope='mmpretrain'
    )
    teacher = torch.load(file, weights_only=False)
    for key, value in head.items():
        teacher['state_dict'][f'head.fc.{key}'] = value
    torch.save(teacher, file)
    model = build(config, settings, 16, checkpoint=file)
    load_checkpoint(model, str(tmp_path / 'out.pth'), strict=True)
    feature = recompute_feature(
        {k: v.double() for k, v in checkpoint['model'].items()}, INPUTS
    )
    model.load_teachers()
    check_logits(model, checkpoint | {'teacher_head': head}, INPUTS, feature)


# -- what is refused ----------------------------------------------------------


def change(part, **values):
    """Replace or (None) remove entries of a part."""

    def apply(checkpoint):
        for key, value in values.items():
            key = key.replace('__', '.')
            checkpoint[part].pop(key, None)
            if value is not None:
                checkpoint[part][key] = value
        return checkpoint

    return apply


def without_statistics(checkpoint):
    gap = checkpoint['gap_model']
    for key in [k for k in gap if 'running' in k or 'num_batches' in k]:
        del gap[key]
    return checkpoint


REFUSED = {
    'a_list': (lambda c: [1, 2], 'no checkpoint of the released'),
    'a_plain_checkpoint': (
        lambda c: {'state_dict': c['model']},
        'it lacks model, gap_model ',
    ),
    'no_branches': (lambda c: c | {'gap_model': None}, 'it lacks gap_model '),
    'no_tensors': (
        lambda c: c | {'teacher_head': {'weight': 1}},
        'it lacks teacher_head ',
    ),
    'no_up_fc': (
        change('model', up_fc__weight=None),
        "`model` has no 'up_fc.weight'",
    ),
    'another_student': (
        lambda c: c | {'model': {'model.0.0.weight': torch.zeros(1)}},
        "`model` has no 'conv1.weight'",
    ),
    'another_depth': (
        lambda c: c | {'model': dict(resnet((2, 2, 2, 3), False, 8, 128))},
        r'\(2, 2, 2, 3\) blocks',
    ),
    'student_lacks': (
        change('model', layer1__0__bn1__running_mean=None),
        'missing in the file .1.: backbone.layer1.0.bn1.running_mean',
    ),
    'student_has_more': (
        change('model', layer5__weight=torch.zeros(1)),
        'not in the model .1.: backbone.layer5.weight',
    ),
    'another_width': (
        change('model', layer2__0__conv1__weight=torch.zeros(16, 4, 3, 3)),
        'other shapes',
    ),
    'serial_net': (
        lambda c: (
            c
            | {
                'gap_model': {
                    k.replace('pred_res_list', 'pred_modules'): v
                    for k, v in c['gap_model'].items()
                }
            }
        ),
        "`gap_model` has no 'pred_res_list.0.0.block.0.weight'",
    ),
    'projections_for_some': (
        change(
            'gap_model', up_fc_list__2__weight=None, up_fc_list__2__bias=None
        ),
        '2 projections .* for 3 branches .*expected 1 or 3',
    ),
    'no_projections': (
        lambda c: (
            c
            | {
                'gap_model': {
                    k: v for k, v in c['gap_model'].items() if 'up_fc' not in k
                }
            }
        ),
        '0 projections',
    ),
    'branch_lacks': (
        change('gap_model', pred_res_list__1__1__block__0__bias=None),
        'missing in the file .1.: levels.0.1.layers.1.bias',
    ),
    'branch_has_more': (
        change('gap_model', quantize__weight=torch.zeros(1)),
        'not in the model .1.: quantize.weight',
    ),
    'layer_norm': (without_statistics, 'norms.0.0.running_mean'),
    'another_head': (
        change('teacher_head', weight=torch.zeros(5, 64)),
        '`teacher_head` must be .* 128 channels',
    ),
    'cosine_head': (change('teacher_head', bias=None), '`teacher_head` must'),
}


@pytest.mark.parametrize('case', REFUSED)
def test_convert__refuses(run, tmp_path, case):
    spoil, message = REFUSED[case]
    spoilt = spoil(official())
    source = tmp_path / 'in.pth'
    torch.save(spoilt, source)
    with pytest.raises(SystemExit, match=message):
        run(source, tmp_path / 'out.pth')
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (b'', 'cannot be read'),
        (b'not a checkpoint', 'cannot be read'),
        (None, 'no such file'),
    ],
)
def test_convert__refuses_other_files(run, tmp_path, content, message):
    source = tmp_path / 'in.pth'
    if content is not None:
        source.write_bytes(content)
    with pytest.raises(SystemExit, match=message):
        run(source, tmp_path / 'out.pth')
    assert not (tmp_path / 'out.pth').exists()


def test_convert__refuses_a_truncated_file(run, tmp_path):
    source = save(official(), tmp_path / 'in.pth')
    source.write_bytes(source.read_bytes()[:-1000])
    with pytest.raises(SystemExit, match='cannot be read'):
        run(source, tmp_path / 'out.pth')


def test_convert__runs_no_code_of_the_file(run, tmp_path):
    class Code:
        def __reduce__(self):
            return (Path.touch, (tmp_path / 'run',))

    torch.save(official() | {'dyrep': Code()}, tmp_path / 'in.pth')
    with pytest.raises(SystemExit, match='more than tensors'):
        run(tmp_path / 'in.pth', tmp_path / 'out.pth')
    assert not (tmp_path / 'run').exists()


def test_convert__never_leaves_half_a_file(run, tmp_path, monkeypatch):
    source = save(official(), tmp_path / 'in.pth')
    target = tmp_path / 'out.pth'
    target.write_bytes(b'before')

    def half(checkpoint, file):
        Path(file).write_bytes(b'half')
        raise OSError('No space left on device')

    monkeypatch.setattr(torch, 'save', half)
    with pytest.raises(SystemExit, match='No space left'):
        run(source, target)
    assert target.read_bytes() == b'before'
    assert sorted(tmp_path.iterdir()) == [source, target]


def test_convert__refuses_to_write_over_its_input(run, tmp_path):
    source = save(official(), tmp_path / 'in.pth')
    before = source.read_bytes()
    with pytest.raises(SystemExit, match='is the file to convert'):
        run(source, source)
    assert source.read_bytes() == before
    with pytest.raises(SystemExit, match='no such folder'):
        run(source, tmp_path / 'none' / 'out.pth')


def test_command__has_help_and_prints_configs_that_fit(run, tmp_path, capsys):
    shown = subprocess.run(
        [sys.executable, str(TOOL), '--help'],
        capture_output=True,
        text=True,
        check=True,
        env={'PYTHONPATH': str(TOOL.parents[1]), 'OMP_NUM_THREADS': '1'},
    ).stdout
    assert 'IN' in shown
    assert 'OUT' in shown
    source = save(official(shared=True), tmp_path / 'in.pth')
    run(source, tmp_path / 'out.pth')
    printed = capsys.readouterr().out
    student = eval(printed.split('student=')[1].splitlines()[0])
    distiller = eval(printed.split('distiller=')[1].splitlines()[0])
    assert distiller.pop('type') == 'era_mm.ERADistiller'
    model = build(student, distiller.pop('mbrnet'), 16, **distiller)
    load_checkpoint(model, str(tmp_path / 'out.pth'), strict=True)
