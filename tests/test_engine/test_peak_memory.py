"""Peaks of memory."""

import torch
from torch import nn

from era_mm.engine.peak_memory import bytes_of, peak_of, running_peak

CPU = torch.device('cpu')


def test_running_peak__by_hand():
    # 1, 3, 2, 6 is the peak, 4; then what was there before goes: still 4.
    events = [(1, 1), (2, 2), (1, -1), (3, 4), (2, -2), (9, -100)]
    assert running_peak(events) == 6
    # An address that is used again.
    assert running_peak([(1, 5), (1, -5), (1, 3), (2, 1)]) == 5
    assert running_peak([]) == 0


def test_peak_of__counts_what_is_alive_on_a_cpu():
    def step():
        first = torch.zeros(256, 1024)  # 1 MiB
        second = torch.zeros(512, 1024)  # 2 MiB: 3
        del first
        third = torch.zeros(1024, 1024)  # 4 MiB: 6, the peak
        del second
        return third, torch.zeros(128, 1024)

    before = [torch.zeros(2048, 1024)]

    def step_that_frees():
        before.clear()
        return torch.zeros(256, 1024)

    assert peak_of(step, CPU) == 6 * 2**20
    # What was there before does not count, and neither does its end.
    assert peak_of(step_that_frees, CPU) == 2**20
    # What an earlier call has left behind is none of a later one's.
    left = []
    peak_of(lambda: left.append(torch.zeros(512, 1024)), CPU)
    left.clear()
    assert peak_of(step, CPU) == 6 * 2**20


def test_peak_of__sees_the_backward_pass():
    layer = nn.Linear(1024, 1024, bias=False)
    inputs = torch.zeros(256, 1024)

    def step():
        layer(inputs).sum().backward()
        layer.zero_grad()

    # Beside two scalars: the output, 1 MiB, is gone by the time of the
    # weight's gradient, 4 MiB; the output's is an expanded scalar, which the
    # product may copy.
    found = peak_of(step, CPU) / 2**20
    assert 4 <= found <= 6.1


def test_bytes_of__counts_what_is_shared_once():
    tensor = torch.zeros(10, 10)
    assert bytes_of([tensor, tensor[0], tensor.T]) == 400
    assert bytes_of([tensor, tensor.clone()]) == 800
    assert bytes_of([]) == 0
