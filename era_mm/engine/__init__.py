"""What stands between the command line and mmengine's Runner."""

from era_mm.engine.amp import CPUAmpOptimWrapper
from era_mm.engine.ddp import DistillationDataParallel, MutualDataParallel
from era_mm.engine.preflight_hook import PreflightHook
from era_mm.engine.residual_vis_hook import ResidualVisHook
from era_mm.engine.run_table_hook import RunTableHook

__all__ = [
    'CPUAmpOptimWrapper',
    'DistillationDataParallel',
    'MutualDataParallel',
    'PreflightHook',
    'ResidualVisHook',
    'RunTableHook',
]
