"""Separate a model into a student and an assistant within its cost.

python tools/split_model.py mmpretrain::resnet/resnet18_8xb32_in1k.py \
    --source backbone --share 0.1
"""

import argparse
import sys
from collections.abc import Sequence

from mmengine.config import Config
from mmengine.registry import DefaultScope

from era_mm.core import distillation_kind
from era_mm.core.host_models import resolve_model_config
from era_mm.engine.preflight import find_config
from era_mm.errors import UserError
from era_mm.methods.residual_kd import Split, split_by_flops


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        'config', help="path or base name of a config, or 'mmdet::...'"
    )
    parser.add_argument(
        '--share',
        type=float,
        default=0.1,
        help="the assistant's share of the FLOPs, in [0, 1)",
    )
    parser.add_argument(
        '--source',
        choices=('backbone', 'neck'),
        default='neck',
        help='behind which part the features of the two are added',
    )
    parser.add_argument(
        '--divisor',
        type=int,
        default=None,
        help='channels are rounded down to its multiples; by default of a '
        'sixteenth of the first stage, at most of 8',
    )
    parser.add_argument(
        '--input-size',
        type=int,
        default=224,
        help='side of the image that FLOPs are measured on, in pixels',
    )
    return parser.parse_args(argv)


def split_config(args: argparse.Namespace) -> Split:
    """Split the model of a config, or the student of a distillation's."""
    reference = args.config
    if '::' not in reference:
        reference = find_config(reference)
    model, scope = resolve_model_config(reference)
    kind = distillation_kind(model)
    if kind == 'MutualDistillation':
        raise UserError(
            f'{args.config} trains two students. Give the plain config of '
            'the one to split.'
        )
    if kind == 'Distillation':
        model, own_scope = resolve_model_config(model.student)
        scope = own_scope or scope
    with DefaultScope.overwrite_default_scope(scope):
        return split_by_flops(
            model,
            args.share,
            source=args.source,
            divisor=args.divisor,
            input_size=args.input_size,
        )


def report(split: Split) -> str:
    """A table of costs, and what the config has to say."""
    whole = split.costs['model'].flops
    lines = [
        f'Up to {split.source!r}; what follows is the same in both.',
        f'{"":10}{"GFLOPs":>10}{"share":>8}{"M params":>10}',
        *(
            f'{name:10}{cost.flops / 1e9:10.3f}{cost.flops / whole:8.3f}'
            f'{cost.params / 1e6:10.3f}'
            for name, cost in split.costs.items()
        ),
        'The pair has adapters and the addition in it.',
    ]
    if split.assistant is None:
        return '\n'.join([*lines, 'A share of 0 leaves the model as it is.'])
    distiller = dict(
        type='era_mm.ResidualKDDistiller',
        source=split.source,
        student=split.student,
        assistant=split.assistant,
    )
    text = Config(dict(distiller=distiller)).pretty_text
    return '\n'.join([*lines, '', text.strip()])


def main(argv: Sequence[str] | None = None) -> int:
    """Print the separation; the exit status is returned."""
    try:
        print(report(split_config(parse_args(argv))))
    except (UserError, ValueError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
