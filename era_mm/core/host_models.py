"""Knowledge of the hosts' models: their parts, kinds and configs."""

import copy
import os
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from mmengine.config import Config, ConfigDict
from mmengine.hub import get_config
from mmengine.structures import BaseDataElement
from torch import Tensor, nn

KINDS = {'BaseDetector': 'detector', 'BaseClassifier': 'classifier'}


class HostModel(NamedTuple):
    """An ordinary model of a host.

    Args:
        config: Its config, as a config file has it.
        module: The model built from it.
    """

    config: ConfigDict
    module: nn.Module


def is_query_based(model: nn.Module) -> bool:
    """Whether it is one of mmdet's DETR-like detectors."""
    return hasattr(model, 'forward_transformer')


def num_classes_of(model: nn.Module) -> int | None:
    """Number of classes of a model, if its head tells."""
    owner = getattr(model, 'roi_head', model)
    for name in ('bbox_head', 'head', 'mask_head'):
        head = getattr(owner, name, None)
        if isinstance(head, nn.ModuleList):
            head = head[-1]
        if head is not None:
            return getattr(head, 'num_classes', None)
    return None


def image_channels(model: nn.Module) -> int:
    """Number of channels of a model's images: 3, 1 (grey), or others.

    As many as its first convolution takes; 3 if it has none.
    """
    modules: Any = getattr(model, 'backbone', model).modules()
    places = 1
    for module in modules:
        if type(module).__name__ == 'Focus':
            # YOLOX puts four pixels into the channels of one.
            places = 4
        if isinstance(module, nn.Conv2d):
            return module.in_channels // places
    return 3


def images_for(model: nn.Module, images: Any) -> Any:
    """A grey student's images as a model gets them; others as they are.

    Args:
        model: A teacher, or the student.
        images: A tensor ``(*, C, H, W)``, or a list of such.
    """
    return images if image_channels(model) == 1 else three_channels(images)


def three_channels(images: Any) -> Any:
    """Grey images for an RGB teacher: their channel three times.

    Images with three channels are returned unchanged.

    Args:
        images: A tensor ``(*, C, H, W)``, or a list of them.
    """
    if not isinstance(images, Tensor):
        return [three_channels(image) for image in images]
    if images.shape[-3] != 1:
        return images
    return images.expand(*images.shape[:-3], 3, *images.shape[-2:])


def kind_of(model: nn.Module) -> str:
    """'detector', 'classifier', or the class name if it is neither."""
    for cls in type(model).__mro__:
        if cls.__name__ in KINDS:
            return KINDS[cls.__name__]
    return type(model).__name__


def resolve_model_config(
    config: str | Mapping,
) -> tuple[ConfigDict, str | None]:
    """Find the model config for a short reference.

    Args:
        config: ``mmdet::retinanet/retinanet_r101_fpn_2x_coco.py`` (or
            ``mmpretrain::...``), the path of a config file, or a model config
            itself (a dict with ``type``).

    Returns:
        The model's config, its ``data_preprocessor`` included, and the scope
        of its types (None: the current one).

    Raises:
        FileNotFoundError: No such config file.
        ValueError: The config has no ``model``.
    """
    if not isinstance(config, str):
        return ConfigDict(copy.deepcopy(dict(config))), None
    if '::' in config:
        scope = config.partition('::')[0]
        cfg = get_config(config)
    else:
        if not os.path.isfile(config):
            raise FileNotFoundError(
                f'Config {config!r} does not exist (looked in '
                f'{os.getcwd()}). Give an absolute path, or a config of an '
                "installed host as 'mmdet::<folder>/<name>.py'."
            )
        cfg = Config.fromfile(config)
        scope = cfg.get('default_scope')
    if 'model' not in cfg:
        raise ValueError(
            f'Config {config!r} has no `model`. Give the config of a whole '
            'model, as it was trained.'
        )
    return whole_model(cfg), scope


def whole_model(cfg: Config) -> ConfigDict:
    """The model of a whole config, its ``data_preprocessor`` included.

    mmpretrain keeps it outside the model.

    Args:
        cfg: A config with ``model``; not changed.
    """
    model = ConfigDict(cfg.model.to_dict())
    if cfg.get('data_preprocessor') is not None:
        model.setdefault('data_preprocessor', cfg.data_preprocessor)
    return model


def forward_until(
    model: nn.Module,
    inputs: Tensor,
    sources: Iterable[str],
    data_samples: list | None = None,
) -> None:
    """Run a model only as deep as its deepest source.

    For sources in the backbone only the backbone runs, for those in the neck
    ``extract_feat``, for those in a region proposal network or a dense head
    these as well, and for any other the whole ``forward(mode='tensor')``.
    """
    parts = {source.partition('.')[0] for source in sources}
    if parts <= {'backbone'} and hasattr(model, 'backbone'):
        model.backbone(inputs)
    elif parts <= {'backbone', 'neck'} and hasattr(model, 'extract_feat'):
        model.extract_feat(inputs)
    elif 'rpn_head' in parts <= {'backbone', 'neck', 'rpn_head'}:
        model.rpn_head(model.extract_feat(inputs))
    elif 'bbox_head' in parts <= {'backbone', 'neck', 'bbox_head'}:
        # mmdet's own 'tensor' mode calls the head's `forward` directly, so
        # a hook on the head itself would not fire.
        model.bbox_head(model.extract_feat(inputs))
    else:
        model(inputs, data_samples, mode='tensor')


def forget_files(model: nn.Module) -> None:
    """Make ``init_weights`` read no weights from a file.

    Args:
        model: A host model, built but not initialised.
    """
    module: Any
    for module in model.modules():
        inits = getattr(module, 'init_cfg', None)
        if isinstance(inits, Mapping):
            inits = [inits]
        kept = [init for init in inits or [] if 'checkpoint' not in init]
        if len(kept) < len(inits or []):
            module.init_cfg = kept or None
        # DetectoRS keeps the file name here as well.
        if isinstance(getattr(module, 'pretrained', None), str):
            module.pretrained = None


def blank_sample(height: int, width: int) -> BaseDataElement:
    """Meta data of an image for a dry run, as preprocessors write it.

    Args:
        height: Height of the image, in pixels.
        width: Width of the image, in pixels.
    """
    size = (height, width)
    return BaseDataElement(
        metainfo=dict(
            img_shape=size,
            ori_shape=size,
            pad_shape=size,
            batch_input_shape=size,
            scale_factor=(1.0, 1.0),
        )
    )
