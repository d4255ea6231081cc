"""What a distillation costs: statistics, memory, and what is refused."""

import json
import random

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.registry import MODELS
from torch import nn

from era_mm import cli
from era_mm.core import BaseDistiller, Distillation
from era_mm.engine import benchmark
from era_mm.engine.benchmark import Options, Rounds, Row, measure
from era_mm.engine.benchmark_models import Distilled, Student
from era_mm.engine.benchmark_report import check_out
from era_mm.engine.peak_memory import peak_of
from era_mm.engine.random_batch import random_batch
from era_mm.errors import UserError
from era_mm.registry import MODELS as ERA_MODELS
from era_mm.testing import (
    classifier_config,
    detector_config,
    distillation_config,
)

FITNET = dict(type='era_mm.FeatureImitationDistiller')


PKD = dict(FITNET, measure='pearson')


SGD = dict(
    type='OptimWrapper', optimizer=dict(type='SGD', lr=0.01, momentum=0.9)
)


CPU = torch.device('cpu')


QUICK = dict(
    batch_size=2, size=(64, 64), iters=3, warmup=1, threads=1, device='cpu'
)


FLAGS = ['--batch-size', '2', '--size', '64', '64', '--iters', '2']


FLAGS += ['--warmup', '0', '--device', 'cpu']


@ERA_MODELS.register_module(force=True)
class BenchmarkShrinkDistiller(BaseDistiller):
    """Needs no teacher, and has nothing to train."""

    needs_teacher = False

    def loss(self, *, student_feats, teacher_feats, data_samples):
        return {
            'loss_shrink': sum(
                feat.square().mean() for feat in student_feats['neck']
            )
        }


@pytest.fixture
def config(tmp_path):
    """Writes the config of a model and gives its path."""

    def write(name, model, scope='mmdet', **entries):
        entries = dict(optim_wrapper=SGD) | entries
        file = tmp_path / f'{name}.py'
        lines = [f'default_scope = {scope!r}', f'model = {model!r}']
        lines += [f'{key} = {value!r}' for key, value in entries.items()]
        file.write_text('\n'.join(lines) + '\n')
        return str(file)

    return write


@pytest.fixture
def load(config):
    def load(*args, **kwargs):
        return Config.fromfile(config(*args, **kwargs))

    return load


# -- rounds -----------------------------------------------------------------


def test_rounds__run_every_row_on_the_same_batch():
    drawn, seen = [], []

    def draw():
        drawn.append(object())
        return drawn[-1]

    def row(name):
        def run(batch):
            step = MessageHub.get_current_instance().get_info('iter')
            numbers = (torch.rand(1).item(), np.random.rand(), random.random())
            seen.append((name, batch, step, numbers))

        return Row(lambda batch: batch, run)

    rounds = Rounds(draw, 7)
    found = rounds.run({n: row(n) for n in 'abc'}, 20, lambda run: run() or 1)
    assert found == {name: [1] * 20 for name in 'abc'}
    orders = set()
    for index in range(20):
        names, batches, steps, numbers = zip(
            *seen[3 * index : 3 * index + 3], strict=True
        )
        assert sorted(names) == ['a', 'b', 'c']
        assert set(batches) == {drawn[index]}
        assert set(steps) == {7 + index}
        # Random numbers, too, in whatever order.
        assert len(set(numbers)) == 1
        orders.add(names)
    assert len(orders) > 3
    assert len({entry[3] for entry in seen}) == 20


# -- whole measurements -----------------------------------------------------


def test_measure__records_what_the_rounds_give(load, capsys):
    cfgs = [
        load(name, distillation_config(distiller))
        for name, distiller in (('fitnet', FITNET), ('pkd', PKD))
    ]
    record = measure(cfgs, Options(**QUICK))
    # All of it is JSON.
    record = json.loads(json.dumps(record))
    assert record['setting'] == dict(
        batch_size=2,
        size=[64, 64],
        size_from='--size',
        objects=5,
        iters=3,
        warmup=1,
        start_iter=1000,
        amp=False,
    )
    assert record['machine']['device'] == 'cpu'
    assert record['machine']['threads'] == 1
    assert record['versions']['torch'] in torch.__version__
    plain = record['plain']
    assert plain['model'] == 'RetinaNet'
    student = MODELS.build(detector_config())
    params = sum(p.numel() for p in student.parameters())
    assert [entry['config'] for entry in record['distillers']] == [
        'fitnet',
        'pkd',
    ]
    for entry in record['distillers']:
        assert entry['distillers'] == {
            'distiller': 'FeatureImitationDistiller'
        }
        assert entry['teachers'] == {'teacher': 'RetinaNet'}
        assert entry['params'] == plain['params'] == params
        plains, teachers, steps, predicts, plain_predicts = (
            times['rounds']
            for times in (
                plain['step_ms'],
                entry['teacher_ms'],
                entry['step_ms'],
                entry['predict_ms'],
                plain['predict_ms'],
            )
        )
        assert len(plains) == len(steps) == 3
        assert all(time > 0 for time in plains + teachers + steps + predicts)
        floors = [a + b for a, b in zip(plains, teachers, strict=True)]
        ratios = [s / f for s, f in zip(steps, floors, strict=True)]
        assert entry['floor_ms']['median'] == sorted(floors)[1]
        assert entry['ratio']['median'] == sorted(ratios)[1]
        assert entry['ratio']['p10'] < entry['ratio']['p90']
        ratios = [p / q for p, q in zip(predicts, plain_predicts, strict=True)]
        assert entry['predict_ratio']['median'] == sorted(ratios)[1]
    assert '3 rounds of about' in capsys.readouterr().out


def test_measure__counts_memory_by_hand(load):
    record = measure(
        [load('fitnet', distillation_config(FITNET))], Options(**QUICK)
    )
    memory = record['distillers'][0]['memory']
    teacher = MODELS.build(detector_config(width=16, channels=24))
    weights = [*teacher.parameters(), *teacher.buffers()]
    assert memory['teacher_weights'] == sum(
        w.numel() * w.element_size() for w in weights
    )
    # 24 channels at strides 8 and 16, float32, two images.
    assert memory['teacher_feats'] == 2 * 24 * (8 * 8 + 4 * 4) * 4
    # A connector from 16 to 24 channels for each of two levels; weights,
    # gradients and momentum.
    model = MODELS.build(distillation_config(FITNET))
    connectors = sum(p.numel() for p in model.distillers.parameters())
    assert connectors > 2 * 16 * 24
    assert memory['extras'] == connectors * 3 * 4
    assert memory['plain_peak'] == record['plain']['peak']
    assert memory['floor'] == sum(
        memory[key]
        for key in ('plain_peak', 'teacher_weights', 'teacher_feats', 'extras')
    )
    assert memory['ratio'] == memory['peak'] / memory['floor']
    # A step holds all weights, and the student's gradients and momentum.
    student = MODELS.build(detector_config())
    params = sum(p.numel() for p in student.parameters())
    assert memory['plain_peak'] > 3 * 4 * params
    assert memory['peak'] > memory['plain_peak'] + memory['teacher_weights']


def test_measure__counts_the_state_of_adam_twice(load):
    adam = dict(
        type='OptimWrapper', optimizer=dict(type='AdamW', lr=0.001, foreach=0)
    )
    extras = [
        measure(
            [load('fitnet', distillation_config(FITNET), optim_wrapper=each)],
            Options(**QUICK),
        )['distillers'][0]['memory']['extras']
        for each in (SGD, adam)
    ]
    model = MODELS.build(distillation_config(FITNET))
    sizes = [p.numel() for p in model.distillers.parameters()]
    # AdamW counts its steps in a scalar for each.
    assert extras[1] - extras[0] == 4 * sum(sizes) + 4 * len(sizes)


def test_measure__of_classifiers(load):
    model = distillation_config(
        FITNET, classifier_config(), classifier_config(width=16)
    )
    record = measure(
        [load('cls', model, scope='mmpretrain')], Options(**QUICK)
    )
    assert record['plain']['model'] == 'ImageClassifier'
    # 8 * 16 pooled channels of two images.
    (entry,) = record['distillers']
    assert entry['memory']['teacher_feats'] == 2 * 128 * 4


def test_measure__without_a_teacher_has_the_plain_step_as_floor(load):
    model = dict(
        type='era_mm.Distillation',
        student=detector_config(),
        distiller=dict(type='era_mm.BenchmarkShrinkDistiller'),
    )
    record = measure([load('shrink', model)], Options(**QUICK))
    (entry,) = record['distillers']
    assert entry['teachers'] == {}
    assert entry['teacher_ms']['rounds'] == [0, 0, 0]
    assert entry['floor_ms']['median'] == record['plain']['step_ms']['median']
    memory = entry['memory']
    assert memory['floor'] == memory['plain_peak']
    assert memory['extras'] == 0


def test_measure__counts_what_a_method_keeps(load):
    residual_kd = dict(type='era_mm.ResidualKDDistiller')
    record = measure(
        [load('pair', distillation_config(residual_kd))], Options(**QUICK)
    )
    (entry,) = record['distillers']
    assert entry['params'] > record['plain']['params']
    added = entry['params'] - record['plain']['params']
    assert entry['memory']['extras'] >= 3 * 4 * added


def test_measure__goes_on_from_the_first_iteration(load, monkeypatch):
    seen = []
    step = Distillation.train_step

    def watched(self, data, wrapper):
        seen.append(self.step)
        return step(self, data, wrapper)

    monkeypatch.setattr(Distillation, 'train_step', watched)
    monkeypatch.setattr(benchmark, 'MEMORY_STEPS', 1)
    cfg = load('fitnet', distillation_config(FITNET))
    measure([cfg], Options(**QUICK, start_iter=70))
    # One to warm up, two with the rest, three rounds, one for the memory.
    assert seen == list(range(70, 77))


def test_measure__begins_when_everything_is_on(load):
    late = dict(FITNET, schedules={'*': dict(start=900, ramp=300)})
    cfg = load('late', distillation_config(late))
    assert measure([cfg], Options(**QUICK))['setting']['start_iter'] == 1200


def test_measure__changes_nothing_of_the_callers(load):
    hub = MessageHub.get_current_instance()
    hub.update_info('iter', 5)
    hub.update_info('max_iters', 9)
    states = [
        torch.get_rng_state(),
        np.random.get_state()[1].copy(),
        random.getstate(),
    ]
    torch.set_num_threads(2)
    cfg = load('fitnet', distillation_config(FITNET))
    before = cfg.to_dict()
    record = measure([cfg], Options(**QUICK))
    assert record['machine']['threads'] == 1
    assert torch.get_num_threads() == 2
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()
    assert random.getstate() == states[2]
    assert hub.get_info('iter') == 5
    assert hub.get_info('max_iters') == 9
    assert hub.get_info('epoch') is None
    assert cfg.to_dict() == before


def test_models__read_no_file_and_start_alike(load):
    student = detector_config(
        init_cfg=dict(type='Pretrained', checkpoint='no_student.pth')
    )
    student['backbone']['init_cfg'] = dict(
        type='Pretrained', checkpoint='no_backbone.pth'
    )
    cfg = load(
        'fitnet',
        distillation_config(FITNET, student, checkpoint='no_teacher.pth'),
    )
    plain = Student(cfg, CPU, amp=False)
    distilled = Distilled(cfg, CPU, amp=False)
    assert distilled.is_plain
    assert plain.params == distilled.params
    for state in (distilled.deployed.state_dict(), plain.model.state_dict()):
        for key, value in plain.deployed.state_dict().items():
            assert torch.equal(state[key], value), key


def test_step__in_mixed_precision_teaches_so(load):
    cfg = load('fitnet', distillation_config(FITNET))
    model = Distilled(cfg, CPU, amp=True)
    assert type(model.wrapper).__name__ == 'CPUAmpOptimWrapper'
    student = MODELS.build(detector_config())
    batch = random_batch(student, 2, (64, 64), 5, torch.Generator())
    feats = model.teach(model.preprocess(batch))
    assert feats['teacher']['neck'][0].dtype == torch.bfloat16
    model.step(batch)
    model.check()


def test_check__refuses_a_loss_that_is_no_number(load):
    model = Student(load('f', distillation_config(FITNET)), CPU, amp=False)
    nn.init.constant_(model.model.backbone.conv1.weight, float('nan'))
    model.step(random_batch(model.model, 1, (64, 64), 5, torch.Generator()))
    with pytest.raises(UserError, match='plain student: the loss became nan'):
        model.check()


# -- the command ------------------------------------------------------------


def test_benchmark__prints_a_table_and_writes_a_file(config, tmp_path, capsys):
    out = tmp_path / 'out.json'
    files = [
        config(name, distillation_config(distiller))
        for name, distiller in (('fitnet', FITNET), ('pkd', PKD))
    ]
    options = ['--cfg-options', 'optim_wrapper.optimizer.momentum=0.0']
    assert (
        cli.run_benchmark([*files, *FLAGS, '--out', str(out), *options]) == 0
    )
    record = json.loads(out.read_text())
    printed = capsys.readouterr().out
    for entry in record['distillers']:
        (row,) = (
            line.split()
            for line in printed.splitlines()
            if line.strip().startswith(f'{entry["config"]} ')
        )
        assert row[1] == f'{entry["step_ms"]["median"]:.2f}'
        assert row[3] == f'{entry["ratio"]["median"]:.3f}'
        assert row[-1] == f'{entry["memory"]["ratio"]:.3f}'
        # Without momentum: weights and gradients.
        model = MODELS.build(distillation_config(FITNET))
        params = sum(p.numel() for p in model.distillers.parameters())
        assert entry['memory']['extras'] == 2 * 4 * params
    assert not list(tmp_path.glob('*.part'))


def test_benchmark__takes_size_and_batch_of_the_config(config, capsys):
    steps = [dict(type='Resize', scale=(96, 64)), dict(type='PackDetInputs')]
    file = config(
        'fitnet',
        distillation_config(FITNET),
        train_dataloader=dict(batch_size=3, dataset=dict(pipeline=steps)),
    )
    flags = ['--iters', '1', '--warmup', '0', '--device', 'cpu']
    assert cli.run_benchmark([file, *flags]) == 0
    printed = capsys.readouterr().out
    assert '64 x 96 (height x width), as in train_dataloader' in printed
    assert '3 images of 64x96' in printed


MUTUAL = dict(
    type='era_mm.MutualDistillation',
    students=dict(a=detector_config(), b=detector_config()),
    distiller=FITNET,
)


@pytest.mark.parametrize(
    ('models', 'message'),
    [
        ([detector_config()], 'expected one whose model is era_mm.Distill'),
        ([MUTUAL], 'trains two students that teach each other'),
        (
            [
                distillation_config(FITNET),
                distillation_config(FITNET, detector_config(width=16)),
            ],
            'expected configs of one student, but those of config0 and',
        ),
    ],
)
def test_benchmark__refuses_other_models(config, models, message, capsys):
    files = [config(f'config{i}', model) for i, model in enumerate(models)]
    assert cli.run_benchmark([*files, *FLAGS]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (['--iters', '0'], '--iters: expected 1 or more, but got 0'),
        (['--size', '0', '64'], '--size: expected 1 or more, but got 0'),
        (['--batch-size', '-1'], '--batch-size: expected 1 or more'),
        (['--start-iter', '-1'], '--start-iter: expected 0 or more'),
        (['--out', 'no/such/folder.json'], '--out: expected a file in a'),
    ],
)
def test_benchmark__refuses_before_it_measures(
    config, flags, message, capsys, monkeypatch
):
    monkeypatch.setattr(
        benchmark, 'measure', lambda *args: pytest.fail('measured')
    )
    file = config('fitnet', distillation_config(FITNET))
    assert cli.run_benchmark([file, *FLAGS, *flags]) == 1
    assert message in capsys.readouterr().err
    assert cli.run_benchmark([file, 'no_such_config', *FLAGS]) == 1
    assert 'no_such_config' in capsys.readouterr().err


def test_benchmark__says_what_the_config_lacks(config, capsys):
    model = distillation_config(FITNET)
    file = config('fitnet', model)
    assert cli.run_benchmark([file]) == 1
    assert 'Give --size HEIGHT WIDTH' in capsys.readouterr().err
    assert cli.run_benchmark([file, '--size', '64', '64']) == 1
    assert 'Give --batch-size' in capsys.readouterr().err
    assert cli.run_benchmark([file, file, *FLAGS]) == 1
    assert 'fitnet was given twice' in capsys.readouterr().err
    adam = dict(optimizer=dict(type='AdamW', lr=0.01))
    other = config('other', model, optim_wrapper=adam)
    assert cli.run_benchmark([file, other, *FLAGS]) == 1
    assert 'trains with SGD and other with AdamW' in capsys.readouterr().err


def test_benchmark__needs_an_optimiser(tmp_path, capsys):
    file = tmp_path / 'bare.py'
    file.write_text(
        f"default_scope = 'mmdet'\nmodel = {distillation_config(FITNET)!r}\n"
    )
    assert cli.run_benchmark([str(file), *FLAGS]) == 1
    assert 'expected an `optim_wrapper`' in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason='needs no GPU')
def test_options__refuse_a_gpu_that_is_not_there():
    with pytest.raises(UserError, match='torch sees none'):
        Options(device='cuda')


def test_check_out__refuses_a_folder(tmp_path):
    with pytest.raises(UserError, match='expected a file'):
        check_out(tmp_path)
    check_out(tmp_path / 'new.json')


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_measure__on_a_gpu(load):
    cfg = load('fitnet', distillation_config(FITNET))
    record = measure([cfg], Options(**QUICK | dict(device='cuda')))
    assert record['machine']['gpu']
    memory = record['distillers'][0]['memory']
    assert memory['peak'] > memory['plain_peak'] > 0
    # torch's allocator counts in blocks of 512 bytes.
    found = peak_of(
        lambda: torch.zeros(256, 1024, device='cuda'), torch.device('cuda')
    )
    assert found == 2**20
