"""Count the parameters and FLOPs of what configs train to be deployed.

python tools/get_flops.py configs/plain/plain_retinanet_r18w16_digits.py \
    configs/residual_kd/residual_kd_retinanet_r18w32_r18w16_digits.py \
    --input-size 128 --out flops.jsonl

Of a distillation that is the student, in Residual KD the pair: its additions
are counted too, which mmengine's counter, and so the hosts' get_flops.py,
passes over.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mmengine.registry import MODELS, DefaultScope

from era_mm.core import distillation_kind, student_config_of
from era_mm.core.host_models import blank_sample, resolve_model_config
from era_mm.engine.preflight import find_config
from era_mm.errors import UserError
from era_mm.methods.residual_kd.split import measure


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        'configs',
        nargs='+',
        help="paths or base names of configs, or 'mmdet::...'",
    )
    parser.add_argument(
        '--input-size',
        type=int,
        default=224,
        help='side of the image that FLOPs are counted on, in pixels',
    )
    parser.add_argument(
        '--out', type=Path, help='file of one JSON object per config'
    )
    return parser.parse_args(argv)


def cost_of(reference: str, side: int) -> dict[str, Any]:
    """What a config's model costs for one image, without post-processing.

    Args:
        reference: See ``parse_args``.
        side: Height and width of the image, in pixels.

    Returns:
        ``config``, ``input_size``, ``params`` and ``flops``, in which a
        multiplication with its addition is one, as mmengine counts.

    Raises:
        UserError: No such config, or one of two students.
    """
    if '::' not in reference:
        reference = find_config(reference)
    config, scope = resolve_model_config(reference)
    kind = distillation_kind(config)
    if kind == 'MutualDistillation':
        raise UserError(
            f'{reference} trains two students. Give the plain config of each.'
        )
    if kind == 'Distillation':
        with DefaultScope.overwrite_default_scope(scope):
            config, own_scope = student_config_of(config)
        scope = own_scope or scope
    with DefaultScope.overwrite_default_scope(scope):
        model = MODELS.build(config)
    # Two-stage detectors ask for the samples in every mode.
    model.forward = partial(
        model.forward, data_samples=[blank_sample(side, side)]
    )
    cost = measure(model, (side, side))['']
    return dict(
        config=Path(reference).stem,
        input_size=side,
        params=cost.params,
        flops=cost.flops,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Print the costs; the exit status is returned."""
    args = parse_args(argv)
    try:
        costs = [cost_of(name, args.input_size) for name in args.configs]
    except (UserError, ValueError, FileNotFoundError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 1
    print(f'{"":50}{"M params":>10}{"GFLOPs":>10}')
    for cost in costs:
        print(
            f'{cost["config"]:50}{cost["params"] / 1e6:10.3f}'
            f'{cost["flops"] / 1e9:10.3f}'
        )
    if args.out:
        text = ''.join(json.dumps(cost) + '\n' for cost in costs)
        part = args.out.with_name(f'{args.out.name}.part')
        part.write_text(text)
        part.replace(args.out)
    return 0


if __name__ == '__main__':
    sys.exit(main())
