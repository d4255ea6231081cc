"""Teacher Weight Integration: what it can use of a model's head.

``find_head`` wraps a model's head in one of the classes of ``twi_heads``;
``predictors_of`` takes a dense head's towers off.
"""

from torch import Tensor, nn

from .twi_heads import (
    DenseTWIHead,
    PredictorTWIHead,
    TWIHead,
    TwoStageTWIHead,
    with_children,
)


def is_query_based(model: nn.Module) -> bool:
    """Whether it is one of mmdet's DETR-like detectors."""
    return hasattr(model, 'forward_transformer')


def find_head(model: nn.Module, place: str = 'head') -> TWIHead | None:
    """What TWI can use of a model; None if there is nothing.

    Args:
        model: A teacher; or a student, for the blend.
        place: 'head' for the whole of it, 'predictors' for the last layers
            of a dense head.

    Raises:
        ValueError: 'predictors' of a head without two towers.
    """
    if place == 'predictors':
        return PredictorTWIHead(predictors_of(model))
    if is_query_based(model):
        return None
    bbox_head = getattr(model, 'bbox_head', None)
    if _can(bbox_head, 'loss', 'predict', 'predict_by_feat'):
        return DenseTWIHead(bbox_head)
    rpn_head = getattr(model, 'rpn_head', None)
    roi_head = getattr(model, 'roi_head', None)
    if _can(rpn_head, 'loss', 'predict', 'predict_by_feat') and _can(
        roi_head, 'loss', 'predict'
    ):
        return TwoStageTWIHead(rpn_head, roi_head)
    head = getattr(model, 'head', None)
    return TWIHead(head) if _can(head, 'loss', 'predict') else None


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
        towers = {name: getattr(head, name, None) for name in names}
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


def tower_sources(model: nn.Module) -> tuple[str, ...]:
    """Names of the last layers of a dense head's two towers.

    Their outputs come in the order of ``PredictorTWIHead``: all levels
    of the classification tower, then all of the other.

    Raises:
        ValueError: The head has no such towers.
    """
    sources = []
    for name, tower in _towers(model).items():
        if name.startswith('multi_level'):
            layers = [f'{level}' for level in range(len(tower))]
        elif isinstance(tower[0], nn.ModuleList):
            layers = [f'{i}.{len(own) - 1}' for i, own in enumerate(tower)]
        else:
            layers = [f'{len(tower) - 1}']
        sources += [f'bbox_head.{name}.{layer}' for layer in layers]
    return tuple(sources)


class _Half(nn.Module):
    """In a tower's place: its own half of the channels, as they come in."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index

    def forward(self, x: Tensor) -> Tensor:
        # Deformable convolutions refuse a strided view.
        return x.chunk(2, dim=1)[self.index].contiguous()


def predictors_of(model: nn.Module) -> nn.Module:
    """A model's dense head less its towers.

    It takes, level by level, the outputs of both towers, one after the other
    along the channels. The rest (predictors, scales, assigner, losses,
    decoding) is the head's own.

    Raises:
        ValueError: The head has no such towers.
    """
    halves: dict[str, nn.Module | None] = {}
    for index, (name, tower) in enumerate(_towers(model).items()):
        if name.startswith('multi_level'):
            own = [_Half(index) for _ in tower]
        elif isinstance(tower[0], nn.ModuleList):
            own = [nn.ModuleList([_Half(index)]) for _ in tower]
        else:
            own = [_Half(index)]
        halves[name] = nn.ModuleList(own)
    return with_children(model.bbox_head, **halves)
