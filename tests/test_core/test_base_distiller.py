"""The optional slots of BaseDistiller, each used by a toy method."""

import copy

import pytest
import torch
from mmengine.logging import MessageHub
from mmengine.registry import MODELS
from torch import nn

from era_mm.core import BaseDistiller, extras_of, utils
from era_mm.engine.ddp import DistillationDataParallel
from era_mm.registry import MODELS as ERA_MODELS
from era_mm.testing import (
    detection_batch,
    detector_config,
    distillation_config,
)


@ERA_MODELS.register_module(name='_SelfDistiller', force=True)
class SelfDistiller(BaseDistiller):
    """Needs no teacher, has no parameters."""

    needs_teacher = False

    def loss(self, *, student_feats, teacher_feats, data_samples):
        assert teacher_feats == {}
        maps = student_feats['neck']
        return {
            'loss_self': maps[0].square().mean(),
            'self_mean': maps[0][0].detach().mean(),
        }


@ERA_MODELS.register_module(name='_SourcelessDistiller', force=True)
class SourcelessDistiller(BaseDistiller):
    """Reads nothing of the student."""

    def __init__(self):
        super().__init__(source=dict(student=[], teacher='neck'))

    def prepare(self, *, student, teacher, student_feats, teacher_feats):
        self.scale = nn.Parameter(torch.ones(()))

    def loss(self, *, student_feats, teacher_feats, data_samples):
        assert student_feats == {}
        feat = teacher_feats['neck'][0]
        return {'loss_scale': (self.scale * feat).square().mean()}


class ToyCoder(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.code = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        return self.code(x)


@ERA_MODELS.register_module(name='_CoderDistiller', force=True)
class CoderDistiller(BaseDistiller):
    """Pre-trains a coder of the teacher's features, then goes on with it."""

    def __init__(self, pretrain_iters=0, **kwargs):
        super().__init__(**kwargs)
        self.pretrain_iters = pretrain_iters

    def prepare(self, *, student, teacher, student_feats, teacher_feats):
        self.channels = teacher_feats['neck'][0].shape[1]
        self.align = nn.Conv2d(
            student_feats['neck'][0].shape[1], self.channels, 1
        )

    def build_inner(self):
        coder = ToyCoder(self.channels)
        return coder, torch.optim.Adam(coder.parameters(), lr=0.01)

    def inner_loss(self, *, student_feats, teacher_feats, data_samples):
        assert not student_feats['neck'][0].requires_grad
        feat = teacher_feats['neck'][0]
        return (self.inner(feat) - feat).square().mean()

    def loss(self, *, student_feats, teacher_feats, data_samples):
        with torch.no_grad():
            code = self.inner(teacher_feats['neck'][0])
        aligned = self.align(student_feats['neck'][0])
        return {'loss_coder': (aligned - code).square().mean()}


def coder_config(teacher_file, **kwargs):
    return distillation_config(
        dict(type='era_mm._CoderDistiller', **kwargs), checkpoint=teacher_file
    )


def without_teacher(distiller):
    config = distillation_config(dict(type=f'era_mm.{distiller}'))
    del config['teacher']
    return MODELS.build(config)


def test_no_teacher__is_needed_nor_allowed_to_be_missing_else():
    model = without_teacher('_SelfDistiller')
    data = model.data_preprocessor(detection_batch(), True)
    losses = model(**data, mode='loss')
    total, log_vars = model.parse_losses(losses)
    # Logged, and not summed into the loss.
    assert 'self_mean' in log_vars
    terms = sum(v.item() for k, v in log_vars.items() if k[:5] == 'loss_')
    assert total.item() == pytest.approx(terms, rel=1e-6)

    with pytest.raises(ValueError, match=r"named 'teacher'.*has none"):
        without_teacher('ERADistiller')


def test_source__of_the_student_may_be_none_and_the_loss_counts(teacher_file):
    config = distillation_config(
        dict(type='era_mm._SourcelessDistiller'), checkpoint=teacher_file
    )
    model = MODELS.build(config).train()
    data = model.data_preprocessor(detection_batch(), True)
    for _ in range(3):
        losses = model(**data, mode='loss')
        total, log_vars = model.parse_losses(losses)
        total.backward()
    # In training as in evaluation.
    with torch.no_grad():
        expected = model.eval()(**data, mode='loss')['loss_scale']
    assert log_vars['loss_scale'] == expected > 0
    assert model.distillers['distiller'].scale.grad > 0


def test_inner__is_outside_the_runs_optimiser_and_steps_by_itself(
    teacher_file,
):
    model = MODELS.build(coder_config(teacher_file))
    inner = model.distillers['distiller'].inner
    assert not {id(p) for p in inner.parameters()} & {
        id(p) for p in model.parameters()
    }
    before = copy.deepcopy(inner.state_dict())
    student = copy.deepcopy(model.student.state_dict())
    data = model.data_preprocessor(detection_batch(), True)
    model(**data, mode='loss')
    assert not torch.equal(before['code.weight'], inner.code.weight)
    assert all(p.grad is None for p in model.parameters())
    for name, parameter in model.student.named_parameters():
        assert torch.equal(student[name], parameter)
    model.double()
    assert inner.code.weight.dtype == torch.float64


def test_inner__state_and_optimiser_ride_in_the_file(teacher_file):
    model = MODELS.build(coder_config(teacher_file))
    data = model.data_preprocessor(detection_batch(), True)
    for _ in range(3):
        model.parse_losses(model(**data, mode='loss'))[0].backward()
    state = model.state_dict()
    assert list(state) == list(model.student.state_dict())
    entry = extras_of(state)['distiller']
    assert set(entry) == {
        *('type', 'state_dict', 'inner', 'inner_optimizer'),
        'measured_on',
    }
    teacher = model.teachers['teacher']
    assert entry['measured_on'] == teacher.fingerprint()

    other = MODELS.build(coder_config(teacher_file))
    other.load_state_dict(state)
    mine, theirs = (
        m.distillers['distiller'].inner_optimizer.state_dict()
        for m in (model, other)
    )
    assert mine['state'][0]['step'] == theirs['state'][0]['step'] == 3
    assert torch.equal(
        model.distillers['distiller'].inner.code.weight,
        other.distillers['distiller'].inner.code.weight,
    )


def test_pretraining__student_stays_and_coder_learns(
    make_runner, teacher_file, tmp_path
):
    # 8 iterations in all, the first 5 pre-train.
    seen = []

    runner = make_runner(coder_config(teacher_file, pretrain_iters=5))
    step = type(runner.model).train_step

    def spy(model, data, optim_wrapper):
        before = copy.deepcopy(model.student.state_dict())
        logged = step(model, data, optim_wrapper)
        same = all(
            torch.equal(before[k], v)
            for k, v in model.student.state_dict().items()
        )
        seen.append((model.step, same, sorted(logged)))
        return logged

    runner.model.train_step = spy.__get__(runner.model)
    runner.train()
    assert [step for step, _, _ in seen] == list(range(8))
    assert [same for _, same, _ in seen] == [True] * 5 + [False] * 3
    assert seen[0][2] == ['distiller.pretrain', 'loss']
    assert 'loss_coder' in seen[5][2]


def test_pretraining__resumes_inside_the_phase(
    make_runner, teacher_file, tmp_path
):
    # The epoch file at iteration 4 lies inside a phase of 6 iterations.
    config = coder_config(teacher_file, pretrain_iters=6)
    make_runner(copy.deepcopy(config), work_dir=tmp_path / 'a').train()
    runner = make_runner(
        copy.deepcopy(config),
        work_dir=tmp_path / 'b',
        resume=True,
        load_from=str(tmp_path / 'a' / 'epoch_1.pth'),
    )
    phases = []
    step = type(runner.model).train_step

    def spy(model, data, optim_wrapper):
        phases.append((model.step, model.pretraining))
        return step(model, data, optim_wrapper)

    runner.model.train_step = spy.__get__(runner.model)
    runner.train()
    assert phases == [(4, True), (5, True), (6, False), (7, False)]
    optimizer = runner.model.distillers['distiller'].inner_optimizer
    # Four steps from the file and four of its own.
    assert optimizer.state_dict()['state'][0]['step'] == 8


def test_pretraining__without_our_wrapper_stops_with_the_remedy(teacher_file):
    model = MODELS.build(coder_config(teacher_file, pretrain_iters=1))
    data = model.data_preprocessor(detection_batch(), True)
    with pytest.raises(RuntimeError, match=DistillationDataParallel.__name__):
        model(**data, mode='loss')


def test_schedule__scales_a_term_by_the_global_step(teacher_file):
    config = coder_config(
        teacher_file, schedules=dict(loss_coder=dict(start=2, ramp=4))
    )
    model = MODELS.build(config)
    distiller = model.distillers['distiller']
    distiller.inner_step = lambda **kwargs: None
    model.eval()
    data = model.data_preprocessor(detection_batch(), True)
    values = []
    for step in range(7):
        MessageHub.get_current_instance().update_info('iter', step)
        values.append(model(**data, mode='loss')['loss_coder'].item())
    full = values[-1]
    assert full > 0
    # 0 before step 2, then 1/4, 2/4, 3/4, 4/4.
    assert [round(v / full, 4) for v in values] == [
        0,
        0,
        0.25,
        0.5,
        0.75,
        1,
        1,
    ]


@pytest.mark.parametrize(
    ('form', 'terms'),
    [('released', ('cls', 'bbox')), ('normalised', ('logit', 'box'))],
)
def test_schedule__goes_on_where_a_resumed_run_does(
    form, terms, make_runner, teacher_file, tmp_path
):
    """Every kind of schedule, by the factors of a whole and a resumed run."""
    kinds = {
        'loss_era_align': dict(scale=0.5),
        'loss_era_residual': dict(ramp=6),
        f'loss_era_twi_{terms[0]}': dict(
            start=2, stop=7, ramp=6, shape='cosine'
        ),
        f'loss_era_twi_{terms[1]}': dict(milestones=[3, 6], gamma=0.5),
    }
    config = distillation_config(
        dict(
            type='era_mm.ERADistiller',
            form=form,
            # It may rest in some steps.
            twi_interval=2,
            schedules=kinds,
        ),
        checkpoint=teacher_file,
    )

    def factors(work_dir, **kwargs):
        runner = make_runner(
            copy.deepcopy(config), work_dir=work_dir, **kwargs
        )
        distiller = runner.model.distillers['distiller']
        seen = {}

        def spy(losses, step):
            seen[step] = [
                type(distiller).scheduled(
                    distiller, dict.fromkeys(kinds, 1.0), step
                )[key]
                for key in kinds
            ]
            return type(distiller).scheduled(distiller, losses, step)

        distiller.scheduled = spy
        runner.train()
        return seen

    whole = factors(tmp_path / 'a')
    resumed = factors(
        tmp_path / 'b',
        resume=True,
        load_from=str(tmp_path / 'a' / 'epoch_1.pth'),
    )
    assert list(whole) == list(range(8))
    assert resumed == {step: whole[step] for step in range(4, 8)}
    # By hand at iteration 4: 5 of 6, (1 - cos(pi / 2)) / 2, one milestone.
    assert resumed[4] == pytest.approx([0.5, 5 / 6, 0.5, 0.5])
    assert resumed[7] == pytest.approx([0.5, 1.0, 0.0, 0.25])


def test_schedule__patterns_meet_several_terms_and_multiply():
    distiller = MODELS.build(
        dict(
            type='era_mm.ERADistiller',
            schedules={
                'loss_era_twi_*': dict(start=3),
                '*': dict(scale=0.5),
            },
        )
    )
    terms = {
        'loss_era_twi_cls': 1.0,
        'loss_era_twi_bbox': 2.0,
        'loss_era_align': 4.0,
        'era_mse_e0': 8.0,
    }
    assert list(distiller.scheduled(terms, 2).values()) == [0, 0, 2, 8]
    assert list(distiller.scheduled(terms, 3).values()) == [0.5, 1, 2, 8]


@pytest.mark.parametrize('step', [0, 1])
def test_schedule__of_a_term_that_rests_is_known(step, teacher_file):
    def losses(*patterns):
        model = MODELS.build(
            distillation_config(
                dict(
                    type='era_mm.ERADistiller',
                    twi_interval=2,
                    schedules={key: dict(scale=0.0) for key in patterns},
                ),
                checkpoint=teacher_file,
            )
        )
        MessageHub.get_current_instance().update_info('iter', step)
        data = model.data_preprocessor(detection_batch(), True)
        return model(**data, mode='loss')

    found = losses('loss_era_twi_*', '*twi_box')
    assert ('loss_era_twi_logit' in found) == (step == 0)
    assert not any(value for key, value in found.items() if 'twi' in key)
    if step == 0:
        with pytest.raises(ValueError, match="'loss_era_tvi_box', which is"):
            losses('loss_era_tvi_box')


def test_schedule__of_an_unknown_term_is_refused(teacher_file):
    config = coder_config(teacher_file, schedules=dict(loss_code=dict()))
    model = MODELS.build(config)
    data = model.data_preprocessor(detection_batch(), True)
    with pytest.raises(ValueError, match=r"'loss_code'.*loss_coder"):
        model(**data, mode='loss')


def test_loss_name__that_the_student_has_is_refused(teacher_file):
    config = coder_config(teacher_file)
    model = MODELS.build(config)
    model.distillers['distiller'].loss = lambda **kwargs: {
        'loss_cls': torch.zeros(())
    }
    data = model.data_preprocessor(detection_batch(), True)
    with pytest.raises(ValueError, match='loss_<method>_<term>'):
        model(**data, mode='loss')


@ERA_MODELS.register_module(name='_SGDCoder', force=True)
class SGDCoder(BaseDistiller):
    needs_teacher = False

    def prepare(self, *, student_feats, **pair):
        self.channels = student_feats['neck'][0].shape[1]

    def build_inner(self):
        coder = nn.Conv2d(self.channels, self.channels, 1)
        return coder, torch.optim.SGD(coder.parameters(), lr=0.1)

    def inner_loss(self, *, student_feats, teacher_feats, data_samples):
        return (self.inner(student_feats['neck'][0]) - 1).square().mean()

    def loss(self, *, student_feats, teacher_feats, data_samples):
        return {'loss_toy': student_feats['neck'][0].mean()}


def test_inner__gradients_are_averaged_over_the_ranks(monkeypatch):
    config = dict(
        type='era_mm.Distillation',
        student=detector_config(),
        distiller=dict(type='era_mm._SGDCoder'),
    )

    def weight_after_a_step():
        torch.manual_seed(0)
        model = MODELS.build(config)
        model(**model.data_preprocessor(detection_batch(), True), mode='loss')
        return model.distillers['distiller'].inner.weight

    alone = weight_after_a_step()
    # Two ranks with one and the same batch: the sum is twice the gradient.
    monkeypatch.setattr(utils, 'all_reduce', lambda g: g.mul_(2))
    monkeypatch.setattr(utils, 'get_world_size', lambda: 2)
    torch.testing.assert_close(weight_after_a_step(), alone)


def test_inner__learns_in_training_only():
    config = dict(
        type='era_mm.Distillation',
        student=detector_config(),
        distiller=dict(type='era_mm._SGDCoder'),
    )
    model = MODELS.build(config).eval()
    before = model.distillers['distiller'].inner.weight.clone()
    data = model.data_preprocessor(detection_batch(), True)
    with torch.no_grad():
        model(**data, mode='loss')
    assert torch.equal(model.distillers['distiller'].inner.weight, before)


def test_pretraining__without_an_inner_module_is_refused():
    class Hollow(BaseDistiller):
        pretrain_iters = 3

        def loss(self, **kwargs):
            return {}

    with pytest.raises(ValueError, match='no inner module'):
        Hollow().set_up_inner()


def test_inner__without_its_loss_is_refused_when_built():
    class Mute(BaseDistiller):
        needs_teacher = False

        def build_inner(self):
            return nn.Linear(1, 1), None

        def loss(self, **kwargs):
            return {}

    with pytest.raises(ValueError, match='no `inner_loss` to train it'):
        Mute().set_up_inner()


@ERA_MODELS.register_module(name='_EarlyDistiller', force=True)
class EarlyDistiller(SelfDistiller):
    """Without a teacher, with all of its losses before the head's."""

    early_sources = ('neck',)

    def early_loss(self, **batch):
        return self.loss(**batch)

    def late_loss(self, *, student_feats):
        return {'loss_late': student_feats['neck'][1].square().mean()}


def test_early__both_halves_are_in_the_step():
    model = without_teacher('_EarlyDistiller')
    data = model.data_preprocessor(detection_batch(), True)
    losses = model(**data, mode='loss')
    assert losses['loss_self'] > 0
    assert losses['loss_late'] > 0


@pytest.mark.parametrize('missing', ['early_loss', 'late_loss'])
def test_early__half_of_it_is_refused(missing, monkeypatch):
    monkeypatch.setattr(
        EarlyDistiller, missing, getattr(BaseDistiller, missing)
    )
    with pytest.raises(ValueError, match=f'but no `{missing}`'):
        EarlyDistiller().check_early()


def test_early__source_that_is_not_recorded_is_refused(monkeypatch):
    monkeypatch.setattr(EarlyDistiller, 'early_sources', ('backbone',))
    with pytest.raises(ValueError, match=r"\['backbone'\], which are not"):
        without_teacher('_EarlyDistiller')
