"""Where branches may begin: the stages of a backbone, and their features.

Legend: N batch, C channels, L tokens.
"""

import math

from torch import Tensor, nn


def _halves(module: nn.Module) -> bool:
    return any(
        max(layer.stride) > 1
        for layer in module.modules()
        if isinstance(layer, nn.Conv2d)
    )


def stage_names(backbone: nn.Module) -> list[str]:
    """Dotted names of a backbone's stages, from the first to the last.

    - ResNet and its kin in both hosts: ``layer1``, ..., ``layer4``.
    - Backbones with ``stages`` (ConvNeXt, Swin, CSWin, ...): ``stages.0``,
      ...; where a stage is a list of ``blocks``, its last block, since what
      Swin's stage itself outputs is more than a feature.
    - Backbones with ``layers`` (MobileNet, CSPDarknet): of the layers that
      have the same resolution, the last.

    Source: ours.

    Args:
        backbone: Of a student.

    Raises:
        ValueError: None of these.
    """
    names = getattr(backbone, 'res_layers', None)
    if names:
        return list(names)
    stages = getattr(backbone, 'stages', None)
    if isinstance(stages, (nn.ModuleList, nn.Sequential)):
        return [
            f'stages.{index}.blocks.{len(stage.blocks) - 1}'
            if isinstance(getattr(stage, 'blocks', None), nn.ModuleList)
            else f'stages.{index}'
            for index, stage in enumerate(stages)
        ]
    layers = getattr(backbone, 'layers', None)
    if isinstance(layers, (nn.ModuleList, nn.Sequential)):
        layers = [f'layers.{index}' for index in range(len(layers))]
    if isinstance(layers, (list, tuple)) and layers:
        found: list[str] = []
        for name in layers:
            if found and not _halves(backbone.get_submodule(name)):
                found.pop()
            found.append(name)
        return found
    children = ', '.join(name for name, _ in backbone.named_children())
    raise ValueError(
        f'The stages of a {type(backbone).__name__} are not known: it has '
        'none of `res_layers`, `stages` and `layers`. Name the stages to '
        f"tap: source=['backbone.<name>', ...]. Its children: {children}."
    )


def as_feature(output: Tensor, *, source: str) -> Tensor:
    """The output of a stage as a map or a vector; tokens become a map.

    Source: ours.

    Shape:
        - output: ``(N, C, H, W)``, ``(N, C)`` or ``(N, L, C)``
        - out: ``(N, C, H, W)`` or ``(N, C)``

    Raises:
        ValueError: Tokens that do not fill a square.
    """
    if output.dim() != 3:
        return output
    num, length, channels = output.shape
    side = math.isqrt(length)
    if side * side != length:
        raise ValueError(
            f'{source!r} outputs {length} tokens, which fill no square, so '
            'their places are not known. Train on square images, or name a '
            "source that outputs maps: source='backbone' with the "
            "backbone's `out_indices`."
        )
    return output.transpose(1, 2).reshape(num, channels, side, side)
