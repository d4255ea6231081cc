"""Teacher Weight Integration: finds the usable head of a model.

``find_head`` wraps a model's head in one of the classes of ``twi_heads``;
``predictors_of`` removes a dense head's towers.
"""

from typing import Any

from torch import Tensor, nn

from ..core.host_models import is_query_based, num_classes_of
from .twi_heads import (
    CLS_HEADS,
    DenseTWIHead,
    PredictorTWIHead,
    ProposalTWIHead,
    TWIHead,
    with_children,
)
from .two_stage import StudentProposals, TwoStageTWIHead


def find_head(model: nn.Module, place: str = 'head') -> TWIHead | None:
    """The head of a model, for TWI; None if there is none that it can use.

    Args:
        model: A teacher; or a student, for the blend.
        place: 'head' for the whole head, 'predictors' for the last layers of
            a dense head.

    Raises:
        ValueError: 'predictors' for a head without two towers.
    """
    if place == 'predictors':
        return PredictorTWIHead(predictors_of(model))
    if is_query_based(model):
        return None
    bbox_head: Any = getattr(model, 'bbox_head', None)
    if _can(bbox_head, 'loss', 'predict', 'predict_by_feat'):
        if any(cls.__name__ == 'RPN' for cls in type(model).__mro__):
            return ProposalTWIHead(bbox_head)
        return DenseTWIHead(bbox_head)
    rpn_head: Any = getattr(model, 'rpn_head', None)
    roi_head: Any = getattr(model, 'roi_head', None)
    if _can(rpn_head, 'loss', 'predict', 'predict_by_feat') and _can(
        roi_head, 'loss', 'predict'
    ):
        return TwoStageTWIHead(rpn_head, roi_head)
    head: Any = getattr(model, 'head', None)
    return TWIHead(head) if _can(head, 'loss', 'predict') else None


def with_loss_of(student: nn.Module, head: TWIHead) -> TWIHead | None:
    """The teacher's classifier head with the student's own loss.

    The loss has the student's smoothing, weight and label format, so that
    estimates are judged as the student's own logits are.

    Source: ERA [official code].

    Args:
        student: The student.
        head: The teacher's head.

    Returns:
        None if the two heads take different label formats, or one of them
        has its own way to compute its loss.
    """
    kinds = [
        {kind.__name__ for kind in type(owner).__mro__} & CLS_HEADS
        for owner in (getattr(student, 'head', None), head.head)
    ]
    if not kinds[0] or kinds[0] != kinds[1]:
        return None
    loss_module = student.head.loss_module
    return TWIHead(with_children(head.head, loss_module=loss_module))


def why_not_comparable(student: nn.Module, teacher: nn.Module) -> str | None:
    """The reason why TWI makes no sense for a pair, or None."""
    if is_query_based(teacher):
        return (
            f"the teacher's head ({type(teacher).__name__}) reads the "
            'queries of a decoder, not the features that are approximated'
        )
    head = find_head(teacher)
    if type(head) is TWIHead and not any(True for _ in head.head.parameters()):
        return (
            f"the teacher's head ({type(head.head).__name__}) has no weights: "
            'what classifies is the end of its backbone, behind the features '
            'that are approximated'
        )
    classes = [num_classes_of(model) for model in (student, teacher)]
    if head is None or classes[0] == classes[1]:
        return None
    shown = ['unknown' if number is None else number for number in classes]
    return (
        f'the teacher has {shown[1]} classes and the student {shown[0]}, so '
        "the ground truth does not fit the teacher's head"
    )


def why_not_reused(student: nn.Module, teacher: nn.Module) -> str | None:
    """The reason why the teacher's head cannot judge estimates, or None.

    ``TWIHead.why_not_judged`` checks what needs features.
    """
    reason = why_not_comparable(student, teacher)
    if reason is not None:
        return reason
    head = find_head(teacher)
    if head is None:
        return (
            f'{type(teacher).__name__} has no head that TWI knows: a dense '
            "`bbox_head`, an `rpn_head` with a `roi_head`, or a classifier's "
            '`head`'
        )
    if isinstance(head, TwoStageTWIHead):
        try:
            StudentProposals(student)
        except ValueError:
            return (
                f"the teacher's RoI head needs the student's proposals, and "
                f'{type(student).__name__} makes none'
            )
    return None


def _can(module: nn.Module | None, *methods: str) -> bool:
    return all(callable(getattr(module, method, None)) for method in methods)


# -- a head without its towers ------------------------------------------------


def _towers(model: nn.Module) -> dict[str, nn.ModuleList]:
    """A dense head's towers by name, classification first.

    The names are mmdet's convention, the second pair YOLOX's.
    """
    head = getattr(model, 'bbox_head', None)
    for names in (
        ('cls_convs', 'reg_convs'),
        ('multi_level_cls_convs', 'multi_level_reg_convs'),
    ):
        towers: dict[str, Any] = {
            name: getattr(head, name, None) for name in names
        }
        if all(isinstance(t, nn.ModuleList) and t for t in towers.values()):
            return towers
    raise ValueError(
        "`twi_place='predictors'` needs a dense head with one tower of layers "
        'for classes and one for boxes (cls_convs and reg_convs), but '
        f'{type(model).__name__} has none: {_heads_of(model)}. Set '
        "twi_place='head'."
    )


def _heads_of(model: nn.Module) -> str:
    return ', '.join(
        f'{name} is a {type(child).__name__}'
        for name, child in model.named_children()
        if name.endswith('head')
    )


def plain_towers(model: nn.Module) -> dict[str, nn.ModuleList]:
    """A dense head's two towers, each one list of layers for all levels.

    Raises:
        ValueError: The head has no towers, or one for each level.
    """
    towers = _towers(model)
    if any(
        name.startswith('multi_level') or isinstance(tower[0], nn.ModuleList)
        for name, tower in towers.items()
    ):
        raise ValueError(
            f'{type(model.bbox_head).__name__} has separate towers for each '
            'level, but a head is needed whose levels share two towers, like '
            'those of RetinaNet, FCOS, ATSS and GFL.'
        )
    return towers


def tower_sources(
    model: nn.Module, layers: int | None = None
) -> tuple[str, ...]:
    """Names of the last layers of a dense head's two towers.

    Their outputs come in the order of ``PredictorTWIHead``: all levels
    of the classification tower, then all of the other.

    Args:
        model: A detector.
        layers: Number of layers of a tower before the source; None: all.

    Raises:
        ValueError: The head has no such towers, or a shorter one.
    """
    if layers is not None:
        towers = plain_towers(model)
        shortest = min(map(len, towers.values()))
        if not 1 <= layers <= shortest:
            raise ValueError(
                f'`layer` must be 1 to {shortest}, the layers in the towers '
                f'of {type(model.bbox_head).__name__}, but got {layers}.'
            )
        return tuple(f'bbox_head.{name}.{layers - 1}' for name in towers)
    sources = []
    for name, tower in _towers(model).items():
        if name.startswith('multi_level'):
            last = [f'{level}' for level in range(len(tower))]
        elif isinstance(tower[0], nn.ModuleList):
            last = [f'{i}.{len(own) - 1}' for i, own in enumerate(tower)]
        else:
            last = [f'{len(tower) - 1}']
        sources += [f'bbox_head.{name}.{layer}' for layer in last]
    return tuple(sources)


class _TowerInput(nn.Module):
    """Replaces a tower: passes on its own half of the input channels."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index

    def forward(self, x: Tensor) -> Tensor:
        # Deformable convolutions refuse a strided view.
        return x.chunk(2, dim=1)[self.index].contiguous()


def predictors_of(model: nn.Module, layers: int | None = None) -> nn.Module:
    """A model's dense head without its towers.

    For each level it takes the outputs of both towers, concatenated along
    the channels. The rest (predictors, scales, assigner, losses, decoding) is
    the head's own.

    Args:
        model: A detector.
        layers: Number of layers of a tower to remove; None: all.

    Raises:
        ValueError: The head has no such towers.
    """
    halves: dict[str, nn.Module | None] = {}
    if layers is not None:
        for index, (name, tower) in enumerate(plain_towers(model).items()):
            halves[name] = nn.ModuleList([_TowerInput(index), *tower[layers:]])
        return with_children(model.bbox_head, **halves)
    own: list[nn.Module]
    for index, (name, tower) in enumerate(_towers(model).items()):
        if name.startswith('multi_level'):
            own = [_TowerInput(index) for _ in tower]
        elif isinstance(tower[0], nn.ModuleList):
            own = [nn.ModuleList([_TowerInput(index)]) for _ in tower]
        else:
            own = [_TowerInput(index)]
        halves[name] = nn.ModuleList(own)
    return with_children(model.bbox_head, **halves)
