"""The term on a classifier's logits."""

import pytest
import torch
from mmengine.hub import get_config
from mmengine.registry import MODELS, init_default_scope

from era_mm.heads.logit import LogitTerm
from era_mm.heads.twi_heads import TWIHead

CLASSES = 3

BY_SIGMOID = {
    'cross-entropy': dict(type='CrossEntropyLoss', use_sigmoid=True),
    'smooth': dict(
        type='LabelSmoothLoss', label_smooth_val=0.1, use_sigmoid=True
    ),
    'several labels': dict(
        type='LabelSmoothLoss', label_smooth_val=0.1, mode='multi_label'
    ),
    'focal': dict(type='FocalLoss'),
    'asymmetric': dict(type='AsymmetricLoss'),
    # The strong ResNet-50 of the zoo.
    'zoo': 'mmpretrain::resnet/resnet50_8xb256-rsb-a1-600e_in1k.py',
}
BY_SOFTMAX = {
    'cross-entropy': dict(type='CrossEntropyLoss'),
    'soft': dict(type='CrossEntropyLoss', use_soft=True),
    'smooth': dict(type='LabelSmoothLoss', label_smooth_val=0.1),
}


def reason_for(teacher, student):
    """Why logits of heads with such losses are not compared."""
    init_default_scope('mmpretrain')
    heads = []
    for loss in (teacher, student):
        if isinstance(loss, str):
            loss = get_config(loss).model.head.loss
        heads.append(
            MODELS.build(
                dict(
                    type='LinearClsHead',
                    num_classes=CLASSES,
                    in_channels=4,
                    loss=loss,
                )
            )
        )
    feats = [torch.zeros(1, 4)]
    return LogitTerm().prepare(
        head=TWIHead(heads[0]),
        student=torch.nn.ModuleDict(dict(head=heads[1])),
        student_feats={'head': [torch.zeros(1, CLASSES)]},
        teacher_feats=feats,
    )


@pytest.mark.parametrize('loss', BY_SIGMOID)
def test_logit__of_a_head_trained_by_sigmoids_is_left_out(loss):
    plain = BY_SOFTMAX['cross-entropy']
    for role, pair in (
        ('teacher', (BY_SIGMOID[loss], plain)),
        ('student', (plain, BY_SIGMOID[loss])),
    ):
        assert reason_for(*pair) == (
            f"the {role}'s LinearClsHead was trained with a sigmoid per "
            'class, so no softmax applies to its logits'
        )


@pytest.mark.parametrize('loss', BY_SOFTMAX)
def test_logit__of_a_head_trained_by_a_softmax_is_compared(loss):
    assert reason_for(BY_SOFTMAX[loss], BY_SOFTMAX[loss]) is None


def test_logit__of_a_head_that_gives_no_logits_is_left_out():
    class Several(torch.nn.Module):
        def forward(self, feats):
            return dict(one=feats[0], two=feats[0])

    feats = [torch.zeros(1, CLASSES)]
    for student in (torch.nn.Identity(), None):
        reason = LogitTerm().prepare(
            head=TWIHead(Several()),
            student=student,
            student_feats={'head': feats},
            teacher_feats=feats,
        )
        assert reason == (
            "the teacher's Several gives a dict, not the logits of classes"
        )
