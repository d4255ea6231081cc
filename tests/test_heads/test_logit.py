"""The term on a classifier's logits."""

import torch

from era_mm.heads.logit import LogitTerm
from era_mm.heads.twi_heads import TWIHead

CLASSES = 3


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
