"""Logit losses: values by hand, invariances, a slow reference."""

import math

import pytest
import torch

from era_mm.layers import dist_loss, kl_loss


def logits(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_kl__by_hand():
    # Teacher (1/2, 1/2), student (3/4, 1/4):
    # KL = 1/2 log((1/2) / (3/4)) + 1/2 log((1/2) / (1/4))
    #    = 1/2 (log 2/3 + log 2) = 0.1438
    student = torch.tensor([[math.log(3.0), 0.0]])
    teacher = torch.zeros(1, 2)
    expected = 0.5 * (math.log(2 / 3) + math.log(2))
    found = kl_loss(student_logits=student, teacher_logits=teacher)
    assert found.item() == pytest.approx(expected, rel=1e-6)
    # Teacher first: the other direction is 3/4 log 3/2 + 1/4 log 1/2.
    other = kl_loss(student_logits=teacher, teacher_logits=student)
    assert other.item() == pytest.approx(
        0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-6
    )


def test_kl__temperature_and_batch_mean():
    student, teacher = logits(3, 5), logits(3, 5, seed=1)
    total = 0.0
    for s, t in zip(student / 4, teacher / 4, strict=True):
        p, q = t.softmax(0), s.softmax(0)
        total += sum(p[k] * (p[k] / q[k]).log() for k in range(5))
    found = kl_loss(
        student_logits=student, teacher_logits=teacher, temperature=4.0
    )
    assert found.item() == pytest.approx(16 * total.item() / 3, rel=1e-12)


def pearson(a, b):
    n = len(a)
    ma, mb = sum(a) / n, sum(b) / n
    cov = sum((x - ma) * (y - mb) for x, y in zip(a, b, strict=True))
    va = sum((x - ma) ** 2 for x in a)
    vb = sum((y - mb) ** 2 for y in b)
    return cov / math.sqrt(va * vb)


def test_dist__against_a_loop():
    student, teacher = logits(4, 6), logits(4, 6, seed=1)
    s = (student / 2).softmax(1).tolist()
    t = (teacher / 2).softmax(1).tolist()
    rows = sum(pearson(a, b) for a, b in zip(s, t, strict=True)) / 4
    columns = (
        sum(
            pearson([row[k] for row in s], [row[k] for row in t])
            for k in range(6)
        )
        / 6
    )
    found = dist_loss(
        student_logits=student, teacher_logits=teacher, temperature=2.0
    )
    expected = 4 * ((1 - rows) + (1 - columns))
    assert found.item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize('loss', [kl_loss, dist_loss])
def test_loss__is_zero_for_equal_logits_and_has_right_gradients(loss):
    teacher = logits(4, 6)
    same = loss(student_logits=teacher, teacher_logits=teacher)
    assert same.item() == pytest.approx(0, abs=1e-9)
    torch.autograd.gradcheck(
        lambda z: loss(
            student_logits=z, teacher_logits=teacher, temperature=1.5
        ),
        logits(4, 6, seed=1).requires_grad_(),
    )
