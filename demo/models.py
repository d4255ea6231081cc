"""What the demos measure on any model: keys, parameters, milliseconds."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import load_checkpoint
from torch import nn

from era_mm.heads import find_head

WARM_UP = 20
TIMED = 100

#: Told the finished share.
Tell = Callable[[float], None]


def teller(folder: Path) -> Callable[[float, float, str], Tell]:
    """Write how far a part of the work is, for the demo's screen.

    Args:
        folder: Gets state.json.

    Returns:
        A function of the shares at which a part starts and stops, and of
        what the screen shows.
    """
    state = folder / 'state.json'

    def part_of(start: float, stop: float, text: str) -> Tell:
        def tell(share: float) -> None:
            part = state.with_suffix('.part')
            part.write_text(
                json.dumps(
                    {'share': start + share * (stop - start), 'text': text}
                )
            )
            part.replace(state)

        tell(0.0)
        return tell

    return part_of


def num_parameters(*modules: nn.Module) -> int:
    """Parameters of some modules together."""
    return sum(p.numel() for module in modules for p in module.parameters())


def stock_keys(
    host: str, config: str, checkpoint: str
) -> dict[str, list[str]]:
    """What a stock host misses in a checkpoint and does not know."""
    init_default_scope(host)
    model = MODELS.build(Config.fromfile(config).model)
    saved = torch.load(checkpoint, map_location='cpu', weights_only=False)
    keys = model.load_state_dict(saved['state_dict'], strict=False)
    return {
        'missing': list(keys.missing_keys),
        'unexpected': list(keys.unexpected_keys),
    }


def build_era(
    host: str, config: str, checkpoint: str, teacher: str
) -> nn.Module:
    """The ERA student with all that T and ST need."""
    cfg = Config.fromfile(config)
    cfg.model.teacher.checkpoint = teacher
    init_default_scope(host)
    model = MODELS.build(cfg.model)
    load_checkpoint(model, checkpoint, map_location='cpu')
    model.load_teachers()
    return model.eval()


def in_mode(model: nn.Module, mode: str | None) -> Callable[[dict], object]:
    """The ERA student's prediction in one inference mode."""

    def predict(data: dict) -> object:
        model.inference_mode = mode
        return model.test_step(data)

    return predict


def time_all(
    variants: dict[str, Callable[[dict], object]],
    files: Sequence[str],
    read: Callable[[str], dict],
    tell: Tell,
) -> dict[str, float]:
    """Median milliseconds per image of each variant, on one thread.

    The variants take turns, so that a busy machine slows all of them.

    Args:
        variants: Predictions.
        files: Images.
        read: Makes a batch of one image, not timed.
        tell: Told the finished share.
    """
    torch.set_num_threads(1)
    times: dict[str, list[float]] = {name: [] for name in variants}
    with torch.no_grad():
        for number in range(WARM_UP + TIMED):
            for name, predict in variants.items():
                data = read(files[number % len(files)])
                start = time.perf_counter()
                predict(data)
                times[name].append(time.perf_counter() - start)
            if number % 20 == 0:
                tell(number / (WARM_UP + TIMED))
    return {
        name: 1000 * statistics.median(values[WARM_UP:])
        for name, values in times.items()
    }


def measure_variants(
    *,
    teacher: nn.Module,
    plain: nn.Module,
    era_student: nn.Module,
    era: nn.Module,
    modes: Sequence[str],
    files: Sequence[str],
    read: Callable[[str], dict],
    tell: Tell,
) -> dict:
    """Parameters and milliseconds of every row of the table.

    Args:
        teacher: The teacher, as the stock host loads it.
        plain: The plain student, likewise.
        era_student: The ERA student, likewise: mode S.
        era: What `build_era` made.
        modes: Those to measure beside S: 'E0', 'T', 'ST'.
        files: Images to time on.
        read: As in `time_all`.
        tell: Told the finished share.
    """
    (distiller,) = era.distillers.values()
    head = num_parameters(find_head(era_student).head)
    features = num_parameters(era_student) - head
    judge = num_parameters(distiller.twi_head.head)
    parameters = {
        'teacher': num_parameters(teacher),
        'plain': num_parameters(plain),
        'era_S': features + head,
        'era_E0': features + num_parameters(distiller.mbrnet.aligns) + judge,
        'era_T': features + num_parameters(distiller) + judge,
        'era_ST': features + num_parameters(distiller) + judge + head,
    }
    times = time_all(
        {
            'teacher': teacher.test_step,
            'plain': plain.test_step,
            'era_S': era_student.test_step,
            **{f'era_{mode}': in_mode(era, mode) for mode in modes},
        },
        files,
        read,
        tell,
    )
    return {
        'timed_images': TIMED,
        'variants': {
            name: {
                'parameters': parameters[name],
                'ms_per_image': times[name],
            }
            for name in times
        },
    }
