"""Logit losses: values by hand, invariances, a slow reference."""

import math

import pytest
import torch

from era_mm.layers import (
    bernoulli_kl_loss,
    best_rows,
    dist_loss,
    dkd_loss,
    kl_loss,
    rows_of_levels,
    standardise_logits,
    top_rows,
)
from era_mm.testing import noise


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
    student, teacher = noise(3, 5), noise(3, 5, seed=1)
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
    return cov / (math.sqrt(va * vb) + 1e-8)


def test_dist__against_a_loop():
    student, teacher = noise(4, 6), noise(4, 6, seed=1)
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


def test_dist__of_tiny_columns_by_hand():
    """1e-8 stands beside the product of the norms, as released.

    Classes 1 and 2 of two samples have probabilities e, 2e and 2e, e: centred
    -+e/2, norm e / sqrt(2), so with e = 1e-5 the product of the norms is
    5e-11 and rho = 5e-11 / (5e-11 + 1e-8) = 0.005. Class 0: 1 - 3e twice.
    """
    e = 1e-5
    probs = torch.tensor(
        [[1 - 3 * e, e, 2 * e], [1 - 3 * e, 2 * e, e]], dtype=torch.float64
    )
    found = dist_loss(student_logits=probs.log(), teacher_logits=probs.log())
    rho = 5e-11 / (5e-11 + 1e-8)
    assert found.item() == pytest.approx(1 - 2 * rho / 3, rel=1e-4)


def test_dist__gradient_of_confident_logits_is_the_released_ones():
    """1000 classes: most columns are near 0, so the epsilon's place counts."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        6 * torch.randn(64, 1000, generator=generator, dtype=torch.float64)
        for _ in range(2)
    )

    def released(z):
        total = 0.0
        matrices = z.softmax(1), teacher.softmax(1)
        for a, b in (matrices, [m.t() for m in matrices]):
            a, b = a - a.mean(1, True), b - b.mean(1, True)
            lengths = a.square().sum(1).sqrt() * b.square().sum(1).sqrt()
            total += 1 - ((a * b).sum(1) / (lengths + 1e-8)).mean()
        return total

    gradients = []
    for loss in (
        released,
        lambda z: dist_loss(student_logits=z, teacher_logits=teacher),
    ):
        z = student.clone().requires_grad_()
        gradients.append(torch.autograd.grad(loss(z), z)[0])
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize('loss', [kl_loss, dist_loss])
def test_loss__is_zero_for_equal_logits_and_has_right_gradients(loss):
    teacher = noise(4, 6)
    same = loss(student_logits=teacher, teacher_logits=teacher)
    # DIST's 1e-8 beside the norms' product leaves a little.
    slack = 1e-9 if loss is kl_loss else 1e-6
    assert same.item() == pytest.approx(0, abs=slack)
    torch.autograd.gradcheck(
        lambda z: loss(
            student_logits=z, teacher_logits=teacher, temperature=1.5
        ),
        noise(4, 6, seed=1).requires_grad_(),
    )


def test_bernoulli_kl__by_hand():
    # q = .75 against sigmoid(0) = .5: .75 ln 1.5 + .25 ln .5 = .13081.
    # Two classes, the other in agreement; T = 2: times 4, mean of two rows.
    target = torch.tensor([[0.75, 0.5], [0.5, 0.5]])
    found = bernoulli_kl_loss(
        student_logits=torch.zeros(2, 2), target=target, temperature=2.0
    )
    assert found.item() == pytest.approx(4 * 0.130812 / 2, rel=1e-4)
    # sigmoid(2 ln 3 / 2) = .75 agrees; targets of 0 and 1 are finite.
    logits = torch.tensor([[2 * math.log(3), 0.0]])
    agreed = bernoulli_kl_loss(
        student_logits=logits, target=target[:1], temperature=2.0
    )
    assert agreed.item() == pytest.approx(0, abs=1e-6)
    hard = bernoulli_kl_loss(
        student_logits=torch.zeros(1, 2), target=torch.tensor([[0.0, 1.0]])
    )
    assert hard.item() == pytest.approx(2 * math.log(2))


def test_rows__are_anchors_of_places_and_the_best_are_taken():
    # One image, two classes, two anchors by place: level 0 has 1 x 2 places,
    # level 1 has one. Channels are anchor 0's classes, then anchor 1's.
    first = torch.arange(8.0).reshape(1, 4, 1, 2)
    second = torch.tensor([9.0, -1, -1, 20]).reshape(1, 4, 1, 1)
    rows = rows_of_levels([first, second], 2)
    expected = [[0, 2], [4, 6], [1, 3], [5, 7], [9, -1], [-1, 20]]
    assert rows.tolist() == [expected]
    index = top_rows(rows, 3)
    assert rows[index].tolist() == [[[-1, 20], [9, -1], [5, 7]]]
    assert rows[top_rows(rows, 99)].shape == (1, 6, 2)


def test_best_rows__are_those_of_the_copied_maps_whatever_lies_beyond():
    # Two anchors, three classes, boxes of four numbers, on three levels.
    sizes = [(3, 4), (2, 2), (1, 1)]
    scores = [noise(2, 6, *size, seed=i) for i, size in enumerate(sizes)]
    boxes = [noise(2, 8, *size, seed=9 + i) for i, size in enumerate(sizes)]
    for topk in (5, 99):
        rows = best_rows(scores, 3, topk)
        index = top_rows(rows_of_levels(scores, 3), topk)
        expected = rows_of_levels(scores, 3)[index]
        assert torch.equal(rows.of(scores), expected)
        assert torch.equal(rows.of(boxes), rows_of_levels(boxes, 4)[index])
        # A student's maps may be larger, where its images are padded more.
        larger = [
            torch.nn.functional.pad(level, (0, 2, 0, 1), value=math.nan)
            for level in scores
        ]
        assert torch.equal(rows.of(larger), expected)


def test_best_rows__gradients_reach_the_chosen_values_alone():
    scores = [noise(1, 4, 2, 2).requires_grad_()]
    rows = best_rows(scores, 2, 1)
    rows.of(scores).sum().backward()
    best = scores[0].detach().flatten().argmax()
    anchor, place = best // 8, best % 4
    expected = torch.zeros(4, 4)
    expected[2 * anchor : 2 * anchor + 2, place] = 1
    assert torch.equal(scores[0].grad.flatten(2)[0].float(), expected)


def test_dkd__by_hand():
    # Class 0 is true. Teacher (1/2, 1/4, 1/4), student (1/4, 1/2, 1/4):
    # KL((1/2, 1/2) || (1/4, 3/4)) = 1/2 log 2 + 1/2 log 2/3
    # KL((1/2, 1/2) || (2/3, 1/3)) = 1/2 log 3/4 + 1/2 log 3/2
    teacher = torch.tensor([[0.5, 0.25, 0.25]]).double().log()
    student = torch.tensor([[0.25, 0.5, 0.25]]).double().log()
    pair = dict(
        student_logits=student + 3,
        teacher_logits=teacher - 1,
        labels=torch.tensor([0]),
        temperature=1.0,
    )
    target = 0.5 * (math.log(2) + math.log(2 / 3))
    others = 0.5 * (math.log(0.75) + math.log(1.5))
    for alpha, beta in ((1.0, 0.0), (0.0, 1.0), (0.5, 8.0)):
        found = dkd_loss(**pair, alpha=alpha, beta=beta)
        expected = alpha * target + beta * others
        assert found.item() == pytest.approx(expected, rel=1e-9)


def test_dkd__with_the_teachers_own_weight_is_kl():
    # KL = TCKD + (1 - p_t) NCKD of each image, eq. 6 of the paper.
    student, teacher = noise(1, 5), noise(1, 5, seed=1)
    share = 1 - (teacher / 4).softmax(1)[0, 2].item()
    found = dkd_loss(
        student_logits=student,
        teacher_logits=teacher,
        labels=torch.tensor([2]),
        alpha=1.0,
        beta=share,
    )
    expected = kl_loss(
        student_logits=student, teacher_logits=teacher, temperature=4.0
    )
    torch.testing.assert_close(found, expected)
    # The mean over images, each with its own class.
    student, teacher = noise(3, 5), noise(3, 5, seed=1)
    labels = torch.tensor([4, 0, 2])
    found = dkd_loss(
        student_logits=student, teacher_logits=teacher, labels=labels
    )
    each = [
        dkd_loss(
            student_logits=student[i : i + 1],
            teacher_logits=teacher[i : i + 1],
            labels=labels[i : i + 1],
        )
        for i in range(3)
    ]
    torch.testing.assert_close(found, sum(each) / 3)


def test_dkd__is_finite_for_sure_logits():
    student = torch.tensor([[200.0, -200.0, 0.0]], requires_grad=True)
    loss = dkd_loss(
        student_logits=student,
        teacher_logits=torch.tensor([[-200.0, 200.0, 0.0]]),
        labels=torch.tensor([0]),
    )
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


def test_standardise__by_hand():
    # (1, 2, 3): mean 2, deviation 1 with K - 1.
    found = standardise_logits(torch.tensor([[1.0, 2.0, 3.0], [5.0, 5.0, 5]]))
    expected = torch.tensor([[-1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    # Neither scale nor shift of the logits matters.
    one = noise(4, 6)
    torch.testing.assert_close(
        standardise_logits(one), standardise_logits(3 * one - 2)
    )
