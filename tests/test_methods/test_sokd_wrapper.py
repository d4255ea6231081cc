"""A distiller around another one hands on what the contract has."""

import pytest
from mmengine.model import BaseModule
from mmengine.registry import MODELS

from era_mm.core import BaseDistiller
from era_mm.engine.preflight_hook import check_length
from era_mm.errors import UserError
from era_mm.methods.sokd.wrapper import WrappingDistiller
from era_mm.testing import distillation_config

#: What is not handed on, and why.
OWN = dict(
    build_inner='brings the inner modules of both together',
    extra_flops='nobody has counted what policy and areas cost',
    freeze_inner='the wrapped one is asked in `inner_step`',
    inner='that of both together',
    inner_loss='of the policy',
    check_early='of its own',
    early_loss='none: the wrapped one reads what the wrapper refines',
    early_sources='none, likewise',
    inner_optimizer='that of both together',
    inner_step='the wrapped one takes its own in it',
    late_loss='none, likewise',
    loss='of a subclass, which calls that of the wrapped one',
    loss_weights='of a subclass, with those of the wrapped one',
    measure_again='of all modules, those of the wrapped one among them',
    needs_teacher='it refines what is learnt from a teacher',
    plan_for='it chooses what is wrapped',
    prepare='of a subclass, which calls that of the wrapped one',
    recipes='of what is wrapped alone',
    scheduled='each applies its own schedules',
    schedules='each has its own',
    set_up_inner='sets up that of the wrapped one first',
)
ARGUMENTS = dict(
    choose_sources=dict(student=None, teacher=None),
    compare=dict(student_feats={}, teacher_feats={}),
    export=dict(mode='T', student=None, teacher=None, inputs=None),
    is_complete=dict(step=3),
    predict=dict(modes=('T',), student=None, student_feats={}),
    student_config=dict(config={}),
    leave_predictions=dict(reason='a reason'),
)


class Told(BaseDistiller):
    """Notes what it was asked, and answers with it."""

    pretrain_iters = 7
    has_phases = True
    predict_sources = ('neck.of_predict',)
    min_iters = 11

    def __init__(self):
        super().__init__(
            source=dict(student='neck.a', teacher='neck.b'), teacher='tutor'
        )
        self.asked = []

    def loss(self, **kwargs):
        return {}


def _answer(name):
    def answer(self, *args, **kwargs):
        self.asked.append(name)
        return 'answer', name

    return answer


for _name in (
    *ARGUMENTS,
    'absent_modes',
    'inference_modes',
    'phase',
    'uses',
):
    setattr(Told, _name, _answer(_name))


class Around(WrappingDistiller):
    def loss(self, **kwargs):
        return {}


def contract():
    """Public methods and attributes that BaseDistiller has of its own."""
    of_an_instance = set(vars(Around(Told()))) - {'base'}
    return {
        name
        for name in set(vars(BaseDistiller)) | of_an_instance
        if not name.startswith('_') and not hasattr(BaseModule(), name)
    }


def test_wrapper__hands_on_or_lists_each_member_of_the_contract():
    names = contract()
    assert set(OWN) <= names
    for name in sorted(names - set(OWN)):
        base = Told()
        found = getattr(Around(base), name)
        if name == 'begin_step':
            found(5)
            assert base.step == 5
        elif callable(found):
            answer = found(**ARGUMENTS.get(name, {}))
            assert base.asked == [name]
            silent = name in ('choose_sources', 'leave_predictions')
            assert answer == ('answer', name) or silent
        elif name != 'step':
            assert found == getattr(base, name), name


def test_wrapper__steps_with_the_wrapped_one():
    base = Told()
    wrapper = Around(base)
    wrapper.begin_step(4)
    assert (wrapper.step, base.step) == (4, 4)


def test_sokd__around_phases_needs_the_run_that_they_need():
    model = MODELS.build(
        distillation_config(
            dict(
                type='era_mm.SoKDDistiller',
                base=dict(
                    type='era_mm.ResidualKDDistiller',
                    phases=dict(student=3, assistant=2, head=None),
                ),
            )
        )
    )
    check_length(model, 6)
    with pytest.raises(UserError, match=r'SoKD.*the 5 iterations'):
        check_length(model, 5)


def test_sokd__in_sokd_is_refused_when_built():
    inner = dict(type='era_mm.SoKDDistiller')
    with pytest.raises(ValueError, match=r'wraps FeatureImitation.* itself'):
        MODELS.build(dict(type='era_mm.SoKDDistiller', base=inner))


def test_wrapper__refuses_a_wrapper():
    with pytest.raises(ValueError, match='wraps Told itself'):
        Around(Around(Told()))
