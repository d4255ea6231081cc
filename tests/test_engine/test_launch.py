"""How a run is started."""

import pytest
from mmengine.config import Config

from era_mm.engine import launch
from era_mm.errors import UserError


def test_use_amp__picks_the_wrapper_of_the_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for device, expected in (
        ('cpu', 'CPUAmpOptimWrapper'),
        ('cuda', 'AmpOptimWrapper'),
    ):
        monkeypatch.setattr(launch, 'get_device', lambda device=device: device)
        cfg = Config(dict(optim_wrapper=dict(type='OptimWrapper')))
        launch.use_amp(cfg)
        assert cfg.optim_wrapper.type == expected


def test_use_amp__refuses_another_wrapper() -> None:
    cfg = Config(dict(optim_wrapper=dict(type='ApexOptimWrapper')))
    with pytest.raises(UserError, match='ApexOptimWrapper'):
        launch.use_amp(cfg)


def test_prepare_launch__explains_missing_variables(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(launch, 'get_device', lambda: 'cpu')
    for name in ('RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT'):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match='RANK, WORLD_SIZE'):
        launch.prepare_launch(Config(dict(launcher='pytorch')))
    with pytest.raises(UserError, match='--launcher slurm'):
        launch.prepare_launch(Config(dict(launcher='slurm')))
