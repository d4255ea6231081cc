"""Everything between the command line and mmengine's Runner."""

from era_mm.engine.amp import CPUAmpOptimWrapper
from era_mm.engine.checkpoint_hook import WholeCheckpointHook
from era_mm.engine.ddp import DistillationDataParallel, MutualDataParallel
from era_mm.engine.finite_hook import FiniteHook
from era_mm.engine.preflight_hook import PreflightHook
from era_mm.engine.residual_vis_hook import ResidualVisHook
from era_mm.engine.run_table_hook import RunTableHook
from era_mm.engine.stop_hook import StopHook

__all__ = [
    'CPUAmpOptimWrapper',
    'DistillationDataParallel',
    'FiniteHook',
    'MutualDataParallel',
    'PreflightHook',
    'ResidualVisHook',
    'RunTableHook',
    'StopHook',
    'WholeCheckpointHook',
]
