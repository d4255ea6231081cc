"""Mixed precision on a CPU."""

import pytest
import torch
from mmengine.model import BaseModel
from torch import nn

from era_mm.engine import CPUAmpOptimWrapper


class ToyModel(BaseModel):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 1, bias=False)
        nn.init.ones_(self.linear.weight)
        self.seen_dtype: torch.dtype | None = None

    def forward(self, inputs, mode='tensor'):
        outputs = self.linear(inputs)
        self.seen_dtype = outputs.dtype
        return dict(loss=outputs.mean())


def test_cpu_amp__runs_the_forward_pass_in_bfloat16() -> None:
    model = ToyModel()
    optimizer = CPUAmpOptimWrapper(
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0)
    )
    model.train_step(dict(inputs=torch.ones(1, 1)), optimizer)
    assert model.seen_dtype is torch.bfloat16
    assert model.linear.weight.dtype is torch.float32
    assert model.linear.weight.item() == pytest.approx(0.0)
