"""Which config stands for each family of the hosts' zoos."""

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from era_mm.hosts import shipped

#: What each family is paired with.
PARTNERS = {
    'mmdet': 'retinanet/retinanet_r18_fpn_1x_coco.py',
    'mmpretrain': 'resnet/resnet18_8xb32_in1k.py',
}

#: Words of a config's name that say how large its model is, small ones first.
SMALL_FIRST = (
    *('atto', 'nano', 'xxsmall', '400mf', '800mf', 'tiny', '5m', 't', 's0'),
    *('a0', 'b0', 'l1', '128s', 'vgg11', 'densenet121', 'r18', 'w18'),
    *('s12', 's', 'small', 'p32', 'r34', 'r50', 'resnet50', 'swint'),
)
#: Where the rule picks a bad one: the config, and why.
CHOSEN = {
    'mmdet::cascade_rpn': (
        'cascade-rpn_faster-rcnn_r50-caffe_fpn_1x_coco.py',
        'the whole detector, not the proposals alone',
    ),
    'mmdet::dcn': (
        'faster-rcnn_r50-dconv-c3-c5_fpn_1x_coco.py',
        'the first by the rule pools without a CPU kernel',
    ),
    'mmdet::dcnv2': (
        'faster-rcnn_r50-mdconv-c3-c5_fpn_1x_coco.py',
        'the first by the rule pools without a CPU kernel',
    ),
    'mmdet::detectors': (
        'detectors_cascade-rcnn_r50_1x_coco.py',
        'RFP and SAC at once, and no third stage of masks',
    ),
    'mmdet::guided_anchoring': (
        'ga-retinanet_r50_fpn_1x_coco.py',
        'the whole detector, not the proposals alone',
    ),
    'mmdet::hrnet': (
        'faster-rcnn_hrnetv2p-w18-1x_coco.py',
        'smaller than HTC',
    ),
    'mmdet::res2net': (
        'faster-rcnn_res2net-101_fpn_2x_coco.py',
        'smaller than HTC',
    ),
    'mmdet::v3det': (
        'fcos_r50_fpn_8x4_sample1e-3_mstrain_v3det_2x.py',
        'smaller than DINO',
    ),
    'mmpretrain::beit': (
        'benchmarks/beit-base-p16_8xb64_in1k.py',
        'the backbone with a head; the others pre-train it',
    ),
    'mmpretrain::beitv2': (
        'benchmarks/beit-base-p16_8xb64_in1k.py',
        'the backbone with a head; the others pre-train it',
    ),
    'mmpretrain::clip': (
        'vit-base-p32_pt-64xb64_in1k.py',
        'fewer tokens than p16',
    ),
    'mmpretrain::mixmim': (
        'benchmarks/mixmim-base_8xb64_in1k.py',
        'the backbone with a head; the others pre-train it',
    ),
    'mmpretrain::resnet': (
        'resnet34_8xb32_in1k.py',
        'ResNet-18 is what the others are paired with',
    ),
    'mmdet::retinanet': (
        'retinanet_r50_fpn_1x_coco.py',
        'R18 is what the others are paired with',
    ),
}
_TRACKING = 'tracks objects through videos; not one detector alone'
_PROMPTS = 'prompted with text: the head compares with a language model'
_SELF = 'pre-trains without labels; its backbone is in another family'
_LANGUAGE = 'writes or reads text beside the image'
_HEADLESS = 'backbones alone, without a head'
#: Folders without a model for this table, and why.
LEFT_OUT = {
    'mmdet::_base_': 'fragments of configs',
    'mmdet::bytetrack': _TRACKING,
    'mmdet::clrnet': 'detects lanes: neither boxes nor masks',
    'mmdet::common': 'fragments of configs: data and schedules',
    'mmdet::deepsort': _TRACKING,
    'mmdet::glip': _PROMPTS,
    'mmdet::grounding_dino': _PROMPTS,
    'mmdet::mask2former_vis': _TRACKING,
    'mmdet::masktrack_rcnn': _TRACKING,
    'mmdet::mm_grounding_dino': _PROMPTS,
    'mmdet::ocsort': _TRACKING,
    'mmdet::qdtrack': _TRACKING,
    'mmdet::reid': 'tells persons apart for tracking; no detector',
    'mmdet::soft_teacher': 'a wrapper around a detector that also trains on '
    'images without labels; pair the detector inside',
    'mmdet::sort': _TRACKING,
    'mmdet::strongsort': _TRACKING,
    'mmpretrain::_base_': 'fragments of configs',
    'mmpretrain::arcface': 'retrieves images; no classifier',
    'mmpretrain::barlowtwins': _SELF,
    'mmpretrain::blip': _LANGUAGE,
    'mmpretrain::blip2': _LANGUAGE,
    'mmpretrain::byol': _SELF,
    'mmpretrain::cae': _SELF,
    'mmpretrain::chinese_clip': _LANGUAGE,
    'mmpretrain::densecl': _SELF,
    'mmpretrain::dinov2': _HEADLESS,
    'mmpretrain::eva': 'its smallest classifier has 304 million parameters, '
    'too many for a pair in the memory allowed; eva02 is here',
    'mmpretrain::flamingo': _LANGUAGE,
    'mmpretrain::glip': _HEADLESS,
    'mmpretrain::itpn': _SELF,
    'mmpretrain::llava': _LANGUAGE,
    'mmpretrain::mae': _SELF,
    'mmpretrain::maskfeat': _SELF,
    'mmpretrain::mff': _SELF,
    'mmpretrain::milan': _SELF,
    'mmpretrain::minigpt4': _LANGUAGE,
    'mmpretrain::mocov2': _SELF,
    'mmpretrain::mocov3': _SELF,
    'mmpretrain::ofa': _LANGUAGE,
    'mmpretrain::otter': _LANGUAGE,
    'mmpretrain::sam': _HEADLESS,
    'mmpretrain::simclr': _SELF,
    'mmpretrain::simmim': _SELF,
    'mmpretrain::simsiam': _SELF,
    'mmpretrain::spark': _SELF,
    'mmpretrain::swav': _SELF,
}


@cache
def config_folder(host: str) -> Path:
    """The configs that an installed host brings along."""
    return shipped(host, 'configs')[0]


def folders(host: str) -> list[str]:
    """All families of a host, as ``mmdet::fcos``."""
    return [
        f'{host}::{path.name}'
        for path in sorted(config_folder(host).iterdir())
        if path.is_dir()
    ]


def rank(stem: str) -> tuple[int, int, str]:
    """Order of configs of one family: small models, short names, alphabet."""
    words = re.split('[-_]', stem.lower())
    sizes = [SMALL_FIRST.index(word) for word in words if word in SMALL_FIRST]
    return min(sizes, default=len(SMALL_FIRST)), len(stem), stem


def choose(family: str, stems: Sequence[str]) -> str:
    """A family's config: the explicit choice, or the first by :func:`rank`.

    Args:
        family: Host and folder.
        stems: Names of the folder's trainable configs, without ``.py``.
    """
    if family in CHOSEN:
        return CHOSEN[family][0]
    return f'{min(stems, key=rank)}.py'


@cache
def config_of(family: str) -> str | None:
    """The config that stands for a family; None where it has none."""
    if family in LEFT_OUT:
        return None
    host, _, name = family.partition('::')
    folder = config_folder(host) / name
    trainable = (
        [Path(CHOSEN[family][0]).stem]
        if family in CHOSEN
        else sorted(
            file.stem
            for file in folder.glob('*.py')
            if not file.stem.endswith('_tta') and file.stem[0] != '_'
        )
    )
    return f'{name}/{choose(family, trainable)}' if trainable else None
