"""What stands between the command line and mmengine's Runner."""

from era_mm.engine.amp import CPUAmpOptimWrapper
from era_mm.engine.checkpoint_hook import WholeCheckpointHook
from era_mm.engine.ddp import DistillationDataParallel, MutualDataParallel
from era_mm.engine.preflight_hook import PreflightHook

__all__ = [
    'CPUAmpOptimWrapper',
    'DistillationDataParallel',
    'MutualDataParallel',
    'PreflightHook',
    'WholeCheckpointHook',
]
