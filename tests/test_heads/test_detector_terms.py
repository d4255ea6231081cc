"""Terms on a detector's scores and boxes."""

import math

import pytest
import torch
from torch import nn

from era_mm.heads import DenseTerm, DenseTWIHead, RoITerm
from era_mm.heads.detector_term import Said
from era_mm.testing import noise

CLOSE = dict(rtol=1e-10, atol=1e-12)


def said_of(scores, boxes, number=None):
    return Said(
        None,
        scores,
        boxes,
        scores.amax(dim=1),
        number or len(scores),
    )


def test_units__make_a_guess_by_frequency_cost_one():
    """Logits that are the log of the mean score, and so for the boxes."""
    sure = noise(12, 3).sigmoid()
    bins = noise(12, 4, 9).softmax(dim=2)
    term = DenseTerm(weight=2.0, box_weight=0.5)
    term.bins = 9
    term._set_up_units(3, 36)
    term.double()
    said = said_of(sure, bins)
    term.measure(said)
    weight = said.sure[:, None, None]
    mean = (weight * bins).sum(0) / weight.sum()
    found = term._compare(
        sure.mean(0).logit().expand(12, 3),
        mean.log().expand(12, 4, 9),
        said,
    )
    assert found['logit'].item() == pytest.approx(2.0, rel=1e-12)
    assert found['box'].item() == pytest.approx(0.5, rel=1e-12)
    # Without a constant added to a softmax's logits, and at the target, 0.
    found = term._compare(sure.logit(), 3 + bins.log(), said)
    assert abs(found['logit']) < 1e-12
    assert abs(found['box']) < 1e-12

    term = RoITerm(weight=2.0, box_weight=0.0)
    term._set_up_units(4, 4)
    term.double()
    scores = noise(12, 4, seed=3).softmax(dim=1)
    said = said_of(scores, None)
    term.measure(said)
    found = term._compare(scores.mean(0).log().expand(12, 4), None, said)
    assert found['logit'].item() == pytest.approx(2.0, rel=1e-12)
    found = term._compare(scores.log(), None, said)
    assert abs(found['logit']) < 1e-12


def test_units__of_sides_are_deviations_where_the_teacher_is_sure():
    # Sureness 1 and 3 at the sides 0 and 4: mean 3, deviation sqrt(3); with
    # the mean sureness 2 the unit is 2 sqrt(3).
    boxes = torch.tensor([[0.0] * 4, [4.0] * 4]).double()
    scores = torch.tensor([[0.1], [0.3]], dtype=torch.float64)
    term = DenseTerm()
    term._set_up_units(1, 4)
    term.double()
    said = said_of(scores, boxes)
    term.measure(said)
    unit = 0.2 * math.sqrt(3)
    assert term.box_unit.value.tolist() == pytest.approx([unit] * 4, rel=1e-12)
    # Off by 1 at the first and by 2 at the second row.
    off = boxes + torch.tensor([[1.0], [-2.0]]).double()
    found = term._compare(scores.logit(), off, said)
    expected = (0.1 * 1 + 0.3 * 2) / 2 / unit
    assert found['box'].item() == pytest.approx(expected, rel=1e-12)


def test_units__rows_that_are_missing_count():
    # Of four rows two were found: the terms are halved, not the same.
    scores = noise(2, 3).sigmoid()
    boxes = noise(2, 4)
    terms = []
    for number in (2, 4):
        term = DenseTerm()
        term._set_up_units(3, 4)
        term.double()
        said = said_of(scores, boxes, number)
        term.measure(said)
        terms.append(term._compare(noise(2, 3, seed=1), boxes + 1, said))
    for name in ('logit', 'box'):
        torch.testing.assert_close(terms[0][name] / 2, terms[1][name], **CLOSE)


@pytest.mark.parametrize('alone', [False, True], ids=['pair', 'teacher'])
def test_dense__guided_anchors_are_not_compared(alone, guided_head):
    own, theirs = guided_head(8), guided_head(16)
    feats = [
        [torch.randn(1, width, size, size) for size in (8, 4)]
        for width in (8, 16)
    ]
    outs = DenseTWIHead(own).training_forward(feats[0])
    # Scores and boxes have the same shapes, whatever the anchors.
    found = [level for kind in outs for level in kind]
    reason = DenseTerm().prepare(
        head=DenseTWIHead(theirs),
        student=None if alone else nn.ModuleDict(dict(bbox_head=own)),
        student_feats={'bbox_head': found},
        teacher_feats=feats[1],
    )
    assert reason is not None
    assert "'s GARetinaHead predicts more than scores and boxes" in reason
