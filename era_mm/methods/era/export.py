"""E0 and T as ordinary host models.

The exported model is the teacher's with the student's backbone and neck.
Between neck and head are the layers that make the estimate: all of ``MBRNet``
for T, only the align layer for E0.

Legend: C_s and C_t channels of student and teacher, L levels.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmengine.config import ConfigDict
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...core import HostModel, load_strictly
from ...core.connections import Connections
from ...errors import UserError
from ...layers import Resampler
from .mbrnet import MBRNet

#: Parts of a model config that come from the student; the rest (type, heads,
#: their assigners and test settings) is the teacher's.
STUDENT_PARTS = (
    'data_preprocessor',
    'backbone',
    'neck',
    'init_cfg',
    'pretrained',
)


def export_estimate(
    mbrnet: MBRNet,
    mode: str,
    *,
    mbrnet_cfg: Mapping[str, Any],
    source: str,
    connections: Connections,
    student: HostModel,
    teacher: HostModel,
    inputs: Tensor,
    keep_align: bool = False,
) -> HostModel:
    """A host model that predicts as mode 'E0' or 'T' does.

        T    neck = [student's neck, era_mm.MBRNet], the teacher's head
        E0   the student's neck with the align layer folded into its last
             convolutions, the teacher's head; for a classifier the align
             layer is folded into the teacher's linear head instead

    Statistics of a normalised space are folded into the layers in both.

    Source: ours.

    Args:
        mbrnet: The trained aligns and branches.
        mode: 'E0' or 'T'.
        mbrnet_cfg: The arguments of ``mbrnet`` that features do not define.
        source: Source of the student that is used.
        connections: Resampling between the source and ``mbrnet``.
        student: The student, in eval mode.
        teacher: The teacher with its weights.
        inputs: Images on which the result is checked, ``(N, 3, H, W)``.
        keep_align: For E0: keep the align layer as a stock layer after the
            neck (``mmdet.ChannelMapper`` of 1x1 convolutions, or
            ``mmpretrain.LinearNeck``), also if it cannot be folded.

    Raises:
        UserError: Another mode, an align layer that cannot be folded, a
            source that does not feed the head, or another result.
    """
    if mode not in ('E0', 'T'):
        raise UserError(
            f"--mode: ERA exports 'E0' and 'T', but got {mode!r}. Choose one "
            "of them, or 'S'."
        )
    if keep_align and mode != 'E0':
        raise UserError(
            f'--keep-align: it is for mode E0, but the mode is {mode}. Omit '
            'it.'
        )
    stages = _neck_stages(source, student)
    resampler = connections.resamplers.get('student')
    if resampler is not None:
        if mode != 'T' and not keep_align:
            raise _cannot_fold(
                "the student's neck",
                'its outputs are resampled or chosen (`source.resample`)',
            )
        stages.append((_resampler_config(resampler), {}))
    folded = mbrnet.folded()
    aligns: Any = folded.aligns
    config, state = _teacher_around(student, teacher)
    folds_into_head = False
    if mode == 'T':
        stages.append(
            (_mbrnet_config(mbrnet, mbrnet_cfg), folded.state_dict())
        )
    elif keep_align:
        stages.append(_align_stage(aligns))
    elif mbrnet.spatial_dims == 0:
        folds_into_head = True
        config['head']['in_channels'] = aligns[-1].in_features
        state |= fold_into_head(teacher.module.head, aligns[-1])
    elif not stages:
        raise _cannot_fold('a neck', 'the student has none')
    else:
        neck = student.module.neck
        last = neck[-1] if isinstance(neck, nn.Sequential) else neck
        stages[-1] = (stages[-1][0], fold_into_neck(last, aligns))
    configs = [stage_config for stage_config, _ in stages]
    if configs:
        config['neck'] = configs if len(configs) > 1 else configs[0]
    for index, (_, stage_state) in enumerate(stages):
        prefix = f'neck.{index}.' if len(stages) > 1 else 'neck.'
        state |= {prefix + key: value for key, value in stage_state.items()}
    module = MODELS.build(copy.deepcopy(config))
    load_strictly(module, state, name=f'the export of {mode}')
    module.eval()
    exported = HostModel(config, module)
    _compare(
        exported,
        mbrnet,
        mode,
        connections=connections,
        student=student,
        head=teacher.module.head if folds_into_head else None,
        inputs=inputs,
    )
    return exported


def _teacher_around(
    student: HostModel, teacher: HostModel
) -> tuple[ConfigDict, dict[str, Tensor]]:
    """Config and weights of the teacher around the student, less the neck."""
    config = copy.deepcopy(teacher.config)
    for part in STUDENT_PARTS:
        config.pop(part, None)
        if part in student.config:
            config[part] = copy.deepcopy(student.config[part])
    dropped: tuple[str, ...] = ()
    if getattr(teacher.module, 'with_mask', False) and not getattr(
        student.module, 'with_mask', False
    ):
        # TWI leaves a mask branch out that the student has no masks for.
        for part in ('mask_head', 'mask_roi_extractor'):
            config['roi_head'].pop(part, None)
        dropped = ('roi_head.mask_',)
    ours = tuple(f'{part}.' for part in STUDENT_PARTS)
    state = {
        key: value
        for key, value in teacher.module.state_dict().items()
        if not key.startswith((*ours, *dropped))
    }
    state |= {
        key: value
        for key, value in student.module.state_dict().items()
        if key.startswith(ours) and not key.startswith('neck.')
    }
    return config, state


def _neck_stages(
    source: str, student: HostModel
) -> list[tuple[dict, dict[str, Tensor]]]:
    """Config and weights of each part of the student's neck."""
    neck = student.config.get('neck')
    feeds_head = 'backbone' if neck is None else 'neck'
    if source != feeds_head:
        raise UserError(
            'An exported head reads the output of '
            f'{feeds_head!r}, but the distiller approximates '
            f'{source!r}. Only `source={feeds_head!r}` can '
            'be exported; S can always be exported.'
        )
    if neck is None:
        return []
    if isinstance(neck, Mapping):
        return [(dict(neck), student.module.neck.state_dict())]
    return [
        (dict(part), module.state_dict())
        for part, module in zip(neck, student.module.neck, strict=True)
    ]


def _mbrnet_config(mbrnet: MBRNet, given: Mapping[str, Any]) -> dict:
    settings = {
        key: value
        for key, value in given.items()
        if key not in MBRNet.SPACE_OPTIONS
    }
    if mbrnet.space is not None:
        settings.pop('share_levels', None)
    return dict(
        type='era_mm.MBRNet',
        in_channels=[align.weight.shape[1] for align in mbrnet.aligns],
        out_channels=[align.weight.shape[0] for align in mbrnet.aligns],
        num_levels=mbrnet.num_levels,
        spatial_dims=mbrnet.spatial_dims,
        **settings,
    )


def _resampler_config(resampler: Resampler) -> dict:
    return dict(
        type='era_mm.Resampler',
        levels=resampler.levels,
        tokens=resampler.tokens,
        num_extra=resampler.num_extra,
        scales=resampler.scales,
    )


def _align_stage(
    aligns: Sequence[nn.Module],
) -> tuple[dict, dict[str, Tensor]]:
    """The align layers as a neck of the hosts."""
    if isinstance(aligns[-1], nn.Linear):
        # A classifier's head reads the last level, so does LinearNeck.
        config = dict(
            type='mmpretrain.LinearNeck',
            in_channels=aligns[-1].in_features,
            out_channels=aligns[-1].out_features,
            norm_cfg=None,
        )
        state = aligns[-1].state_dict()
        return config, {f'fc.{key}': value for key, value in state.items()}
    widths = {align.out_channels for align in aligns}
    if not isinstance(aligns[0], nn.Conv2d) or len(widths) > 1:
        raise UserError(
            'No stock neck can hold this align layer: expected maps of one '
            f'width, but got {type(aligns[0]).__name__} to '
            f'{[align.out_channels for align in aligns]} channels. Export T, '
            'or S.'
        )
    config = dict(
        type='mmdet.ChannelMapper',
        in_channels=[align.in_channels for align in aligns],
        out_channels=aligns[0].out_channels,
        kernel_size=1,
        act_cfg=None,
    )
    return config, {
        f'convs.{level}.conv.{key}': value
        for level, align in enumerate(aligns)
        for key, value in align.state_dict().items()
    }


def fold_into_head(head: nn.Module, align: nn.Linear) -> dict[str, Tensor]:
    """Weights of a linear classifier with the align layer folded in.

        W' = W_h U        b' = W_h c + b_h

    Args:
        head: The teacher's head, ``W_h x + b_h``.
        align: The align layer, ``U x + c``.

    Shape:
        - W_h: ``(K, C_t)``, U: ``(C_t, C_s)``, W': ``(K, C_s)``

    Raises:
        UserError: Another head than ``LinearClsHead``.
    """
    from mmpretrain.models import LinearClsHead

    if type(head) is not LinearClsHead:
        raise _cannot_fold(
            "the teacher's head",
            f'it is a {type(head).__name__}, and only LinearClsHead is known '
            'to begin with its only linear layer',
        )
    weight = head.fc.weight.double()
    bias = weight @ align.bias.double() + head.fc.bias.double()
    weight = weight @ align.weight.double()
    return {'head.fc.weight': weight.float(), 'head.fc.bias': bias.float()}


def fold_into_neck(
    neck: nn.Module, aligns: Sequence[nn.Module]
) -> dict[str, Tensor]:
    """Weights of an FPN that outputs ``U_l P_l + c_l`` instead of ``P_l``.

        W_l' = U_l W_l        b_l' = U_l b_l + c_l

    for the output convolution of each level. Where a batch norm follows it,
    the norm (as it is in eval mode) goes into the convolution first and
    becomes the identity plus ``b_l'``. Levels that are subsampled from the
    one below need no convolution if both have the same align layer.

    Args:
        neck: The student's neck.
        aligns: One 1x1 convolution per level.

    Shape:
        - W_l: ``(C, C, 3, 3)``, U_l: ``(C, C)``

    Raises:
        UserError: The fold would not be exact; the message says where.
    """
    reason = _why_not_foldable(neck, aligns)
    if reason is not None:
        raise _cannot_fold("the student's neck", reason)
    state = dict(neck.state_dict())
    for level, module in enumerate(neck.fpn_convs):
        weight = module.conv.weight.double()
        if module.with_norm:
            norm = module.norm
            scale = (
                norm.weight.double()
                / (norm.running_var.double() + norm.eps).sqrt()
            )
            bias = norm.bias.double() - scale * norm.running_mean.double()
            weight = scale[:, None, None, None] * weight
        else:
            bias = module.conv.bias.double()
        align = aligns[level].weight.double().flatten(1)
        weight = torch.einsum('oc,cihw->oihw', align, weight)
        bias = align @ bias + aligns[level].bias.double()
        prefix = f'fpn_convs.{level}.'
        folded = {f'{prefix}conv.weight': weight}
        if module.with_norm:
            name = f'{prefix}{module.norm_name}.'
            folded |= {
                f'{name}weight': torch.ones_like(bias),
                f'{name}bias': bias,
                f'{name}running_mean': torch.zeros_like(bias),
                f'{name}running_var': torch.full_like(bias, 1 - norm.eps),
            }
        else:
            folded[f'{prefix}conv.bias'] = bias
        state |= {key: value.to(state[key]) for key, value in folded.items()}
    return state


def _why_not_foldable(
    neck: nn.Module, aligns: Sequence[nn.Module]
) -> str | None:
    from mmdet.models.necks import FPN

    if type(neck) is not FPN:
        return (
            f'it is a {type(neck).__name__}, and only FPN is known to end in '
            'plain convolutions that nothing else reads'
        )
    if aligns[0].out_channels != neck.out_channels:
        return (
            f"the student's maps have {neck.out_channels} channels and the "
            f"teacher's {aligns[0].out_channels}, and FPN has one width for "
            'all its layers'
        )
    for level, module in enumerate(neck.fpn_convs):
        name = f'neck.fpn_convs.{level}'
        if module.with_activation:
            return f'an activation follows {name} (`act_cfg`)'
        if type(module.conv) is not nn.Conv2d:
            kind = type(module.conv).__name__
            return f'{name} is a {kind}, not a plain convolution'
        if module.with_norm and not (
            isinstance(module.norm, _BatchNorm)
            and module.norm.affine
            and module.norm.track_running_stats
        ):
            kind = type(module.norm).__name__
            return (
                f'{name} is followed by a {kind}, which depends on the image '
                'or has no weights to carry the fold (`norm_cfg`)'
            )
    first_extra = neck.backbone_end_level - neck.start_level
    for level in range(first_extra, neck.num_outs):
        if not neck.add_extra_convs:
            if not _same(aligns[level], aligns[level - 1]):
                return (
                    f'level {level} is level {level - 1} subsampled, but '
                    'their align layers differ'
                )
        elif level > first_extra or neck.add_extra_convs == 'on_output':
            return (
                f'neck.fpn_convs.{level} computes level {level} from the '
                f'output of level {level - 1} '
                f'(add_extra_convs={neck.add_extra_convs!r}), which the fold '
                'would change'
            )
    return None


def _same(first: nn.Module, second: nn.Module) -> bool:
    return torch.equal(first.weight, second.weight) and torch.equal(
        first.bias, second.bias
    )


def _cannot_fold(place: str, reason: str) -> UserError:
    return UserError(
        f'E0: the align layer cannot be folded into {place}: {reason}. Add '
        '--keep-align: it is then kept, exact and small, as a stock layer '
        'after the neck.'
    )


@torch.no_grad()
def _compare(
    exported: HostModel,
    mbrnet: MBRNet,
    mode: str,
    *,
    connections: Connections,
    student: HostModel,
    head: nn.Module | None,
    inputs: Tensor,
) -> None:
    """Refuse an export whose output differs from the estimate.

    Some detectors of the hosts have their own ``extract_feat``, and some
    necks derive from others, so the assumptions above are tested here. Double
    precision leaves only the rounding of folded weights.
    """

    def double(part: Any) -> Any:
        return copy.deepcopy(part).double().eval()

    mbrnet = double(mbrnet)
    plain, module = double(student.module), double(exported.module)
    feats = connections.connected(plain.extract_feat(inputs.double()))
    wanted = mbrnet(feats) if mode == 'T' else mbrnet.estimates(feats, 0)[0]
    found = module.extract_feat(inputs.double())
    if head is not None:
        wanted, found = (double(head)(wanted),), (module.head(found),)
    for level, feat in enumerate(found):
        want = wanted[level - len(found)]
        if feat.shape != want.shape or not torch.allclose(
            feat, want, rtol=0, atol=1e-4 * float(want.abs().max())
        ):
            raise UserError(
                f'{mode} cannot be exported: at level {level} the exported '
                f'{type(module).__name__} does not compute the same as the '
                f'{type(plain).__name__} with MBRNet. One of the two '
                'does more between backbone and head than its config says.'
            )
