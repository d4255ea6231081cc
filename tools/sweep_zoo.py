"""Try every family of the hosts' model zoos, alone and in pairs.

python tools/sweep_zoo.py --only mmdet::fcos
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import math
import multiprocessing
import re
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

from era_mm.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
#: What each family is paired with.
PARTNERS = {
    'mmdet': 'retinanet/retinanet_r18_fpn_1x_coco.py',
    'mmpretrain': 'resnet/resnet18_8xb32_in1k.py',
}
CELLS = ('plain', 'self', 'teacher', 'student')
STEPS = 2
BATCH = 2
#: Height and width of a detector's images; the first that the host takes.
SIZES = ((64, 96), (128, 160), (256, 256), (320, 320), (512, 512))
#: Regions sampled in training, regions kept and, as many, learnt, points of a
#: mask's loss: what costs time and changes nothing that is asked here.
MOST = {'num': 16, 'max_per_img': 20, 'num_proposals': 20, 'num_points': 256}
#: Types of an `init_cfg` with a file; PVT's have none.
INITS = ('Pretrained', 'PretrainedInit', None)
MEMORY_GIB = 8
TIMEOUT_S = 600

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


# -- which configs ------------------------------------------------------------


@cache
def config_folder(host: str) -> Path:
    """The configs that an installed host brings along."""
    spec = importlib.util.find_spec(host)
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0], '.mim', 'configs')


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


# -- small versions of them ---------------------------------------------------


def shrink(value: Any, size: tuple[int, int]) -> Any:
    """A config without downloads, other devices' parts and large images."""
    if isinstance(value, Mapping):
        kind = value.get('type')
        if 'checkpoint' in value and kind in INITS:
            return None
        found = {k: shrink(v, size) for k, v in value.items()}
        for key in ('pretrained', 'teacher_ckpt'):
            if isinstance(found.get(key), str):
                found[key] = None
        if kind in ('SyncBN', 'MMSyncBN'):
            found['type'] = 'BN'
        if kind == 'BatchFixedSizePad':
            found['size'] = size
        if kind == 'BatchResize':
            found['scale'] = size[::-1]
        for key, most in MOST.items():
            if isinstance(found.get(key), int):
                found[key] = min(found[key], most)
        return found
    if isinstance(value, (list, tuple)):
        return type(value)(
            part
            for part in (shrink(item, size) for item in value)
            if part is not None or None in value
        )
    return value


def source_of(value: Any) -> str:
    """A value as Python that makes it again."""
    if isinstance(value, Mapping):
        parts = [f'{k!r}: {source_of(v)}' for k, v in value.items()]
        return f'{{{", ".join(parts)}}}'
    if isinstance(value, (list, tuple)):
        parts = [source_of(item) for item in value]
        if isinstance(value, list):
            return f'[{", ".join(parts)}]'
        return f'({", ".join(parts)}{"," if len(parts) == 1 else ""})'
    if isinstance(value, float) and not math.isfinite(value):
        return f'float({str(value)!r})'
    return repr(value)


def write_small(reference: str, folder: Path, size: tuple[int, int]) -> str:
    """Write a config of a host, shrunk, into a folder; returns the file."""
    from mmengine.config import Config

    host, _, inside = reference.partition('::')
    cfg = Config.fromfile(config_folder(host) / inside).to_dict()
    cfg = {**cfg, 'model': shrink(cfg['model'], size)}
    if 'data_preprocessor' in cfg:
        cfg['data_preprocessor'] = shrink(cfg['data_preprocessor'], size)
    folder.mkdir()
    file = folder / Path(inside).name
    file.write_text(''.join(f'{k} = {source_of(v)}\n' for k, v in cfg.items()))
    return str(file)


# -- data ---------------------------------------------------------------------


def transforms(node: Any) -> Iterator[Mapping]:
    """Everything with a type below a data set's config."""
    if isinstance(node, Mapping):
        if 'type' in node:
            yield node
        for value in node.values():
            yield from transforms(value)
    elif isinstance(node, (list, tuple)):
        for value in node:
            yield from transforms(value)


def detection_data(
    cfg: Any, size: tuple[int, int], num_classes: int | None
) -> dict:
    """A batch of noise with the truth that a config's pipeline loads."""
    import torch
    from mmdet.testing import demo_mm_inputs
    from mmengine.structures import InstanceData

    steps = list(transforms(cfg.train_dataloader))
    kinds = {str(step['type']).rpartition('.')[2] for step in steps}
    panoptic = 'LoadPanopticAnnotations' in kinds
    scale = next(
        (s['scale_factor'] for s in steps if s['type'] == 'SegRescale'), 1
    )
    batch = demo_mm_inputs(
        batch_size=BATCH,
        image_shapes=(3, *size),
        num_items=[3] * BATCH,
        num_classes=min(num_classes or 2, 80) + 1,
        with_mask=panoptic or any(s.get('with_mask') for s in steps),
        with_semantic=panoptic or any(s.get('with_seg') for s in steps),
        sem_seg_output_strides=round(1 / scale),
    )
    for sample in batch['data_samples']:
        # The helper counts labels from 1.
        sample.gt_instances.labels -= 1
        if 'LoadProposals' in kinds:
            boxes = sample.gt_instances.bboxes
            sample.proposals = InstanceData(
                bboxes=torch.cat([boxes, boxes + 3]),
                scores=torch.ones(2 * len(boxes)),
            )
    return batch


def classification_data(cfg: Any, num_classes: int | None) -> dict:
    """A batch of noise, of the size that a config's pipeline puts out."""
    import torch
    from mmpretrain.structures import DataSample

    from era_mm.engine.host_configs import HostConfig, crop_size

    side = crop_size(HostConfig('', Path(), cfg)) or 224
    mean = (cfg.get('data_preprocessor') or {}).get('mean') or [0] * 3
    generator = torch.Generator().manual_seed(0)
    return dict(
        inputs=[
            torch.randint(
                0, 256, (len(mean), side, side), generator=generator
            ).byte()
            for _ in range(BATCH)
        ],
        data_samples=[
            DataSample().set_gt_label(label % (num_classes or 2))
            for label in range(BATCH)
        ],
    )


# -- one cell -----------------------------------------------------------------


def settle(model: Any, data: dict) -> None:
    """Give the batch norms before the head the statistics of a batch.

    Trained models have some. Without, values grow from layer to layer in
    those that never look at the batch (HRNet's, with `norm_eval`).
    """
    import torch
    from torch.nn.modules.batchnorm import _BatchNorm

    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    training = model.training
    model.eval()
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    with torch.no_grad():
        model.extract_feat(model.data_preprocessor(data)['inputs'])
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        # Of the few values of a small map it may be next to nothing, and the
        # next batch would be blown up.
        if norm.running_var is not None:
            norm.running_var.clamp_(min=1)
    # Not in one line: the `train` of mmdet's LAD returns nothing.
    model.train(training)


def train_and_predict(model: Any, cfg: Any, batch: Callable[[], dict]) -> None:
    """Two steps of a config's optimiser and a prediction for each image.

    Raises:
        ArithmeticError: A loss that is not finite.
        RuntimeError: Not as many predictions as images.
    """
    import torch
    from mmengine.logging import MessageHub
    from mmengine.optim import build_optim_wrapper

    model.init_weights()
    teachers = [t.model for t in getattr(model, 'teachers', {}).values()]
    for part in (getattr(model, 'student', model), *teachers):
        settle(part, batch())
    model.train()
    optim = cfg.optim_wrapper.to_dict()
    # Mixed precision has kernels for GPUs alone in mmcv, and without trained
    # weights gradients may be of any size.
    optim = {
        k: v for k, v in optim.items() if k not in ('loss_scale', 'dtype')
    } | dict(type='OptimWrapper', clip_grad=dict(max_norm=1))
    wrapper = build_optim_wrapper(model, optim)
    for group in wrapper.optimizer.param_groups:
        group['lr'] = 1e-5
    hub = MessageHub.get_current_instance()
    for step in range(STEPS):
        # Heads that warm up ask for it, as the Runner keeps it.
        hub.update_info_dict(dict(iter=step, epoch=0))
        losses = model.train_step(batch(), wrapper)
        bad = [k for k, v in losses.items() if not torch.isfinite(v).all()]
        if bad:
            raise ArithmeticError(f'step {step}: not finite: {bad}')
    model.eval()
    data = batch()
    # As the config's own test loader gives them: detectors one by one.
    number = min(BATCH, cfg.test_dataloader.batch_size)
    with torch.no_grad():
        for start in range(0, BATCH, number):
            part = {k: v[start : start + number] for k, v in data.items()}
            found = model.test_step(part)
            if len(found) != number:
                raise RuntimeError(f'{len(found)} predictions of {number}')


def batch_maker(
    host: str, cfg: Any, size: tuple[int, int], model: Any
) -> Callable[[], dict]:
    """Makes the same batch again and again: steps may change it."""
    from era_mm.core.host_models import num_classes_of

    classes = num_classes_of(model)
    if host == 'mmpretrain':
        return lambda: classification_data(cfg, classes)
    return lambda: detection_data(cfg, size, classes)


def run_plain(reference: str, folder: Path) -> dict[str, Any]:
    """The host's own model; finds the size of image that it takes."""
    import torch
    from mmengine.config import Config
    from mmengine.registry import MODELS, DefaultScope

    from era_mm.engine.host_configs import read_host_config

    host, _, inside = reference.partition('::')
    try:
        Config.fromfile(config_folder(host) / inside)
    # RepLKNet's imports what mmengine takes for the other kind of config.
    except Exception as error:
        return dict(result='host', detail=describe(error))
    # The last one tells most: some only refuse the smaller images.
    last: Exception | None = None
    for index, size in enumerate(SIZES if host == 'mmdet' else SIZES[:1]):
        torch.manual_seed(0)
        config = read_host_config(
            write_small(reference, folder / f'plain{index}', size)
        )
        try:
            with DefaultScope.overwrite_default_scope(config.scope):
                model = MODELS.build(config.model)
                train_and_predict(
                    model,
                    config.cfg,
                    batch_maker(host, config.cfg, size, model),
                )
        # Whatever a host raises: this is the question.
        except Exception as error:
            traceback.print_exc()
            last = error
            continue
        return dict(result='works', size=list(size))
    assert last is not None
    return dict(result='host', detail=describe(last))


def run_pair(
    student: str, teacher: str, folder: Path, size: tuple[int, int]
) -> dict[str, Any]:
    """``make_config`` for a pair, two steps and a prediction."""
    import torch
    from mmengine.registry import DefaultScope

    from era_mm.engine.host_configs import read_host_config
    from era_mm.engine.make_config import make_config

    torch.manual_seed(0)
    # Two files, even of one config: a model may learn from another training
    # of itself.
    own, theirs = (
        read_host_config(write_small(reference, folder / role, size), role)
        for role, reference in (('student', student), ('teacher', teacher))
    )
    try:
        made = make_config(own, theirs, teacher_checkpoint='random')
    except UserError as error:
        return dict(result='refused', detail=describe(error))
    host = student.partition('::')[0]
    with DefaultScope.overwrite_default_scope(own.scope):
        train_and_predict(
            made.model,
            own.cfg,
            batch_maker(host, own.cfg, size, made.model.student),
        )
    return dict(
        result='works',
        twi=made.plans['era'].distiller.get('twi_steps') != 'none',
        detail=clean(made.plans['era'].head or ''),
    )


def describe(error: BaseException) -> str:
    """An exception in a line, without the places of this machine."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else ''
    kind = type(error).__name__
    return clean(text if kind == 'UserError' else f'{kind}: {text}')


def clean(text: str) -> str:
    """A message without the folders of the machine it was made on."""
    text = re.sub(r'(?<![\w:/.])/(?:[^\s/\'"]+/)+', '', text)
    return re.sub(r'0x[0-9a-f]{6,}', '0x...', text)


# -- processes ----------------------------------------------------------------


class Cell(NamedTuple):
    """One thing to try.

    Args:
        family: Host and folder.
        config: Its config below the host's folder.
        kind: One of :data:`CELLS`.
        size: Of the images; None for 'plain', which finds it.
    """

    family: str
    config: str
    kind: str
    size: tuple[int, int] | None = None

    @property
    def key(self) -> tuple[str, str]:
        """What tells it from the others."""
        return self.family, self.kind


def try_cell(cell: Cell) -> dict[str, Any]:
    """Run a cell in this process."""
    host = cell.family.partition('::')[0]
    reference = f'{host}::{cell.config}'
    partner = f'{host}::{PARTNERS[host]}'
    with tempfile.TemporaryDirectory(prefix='sweep_zoo-') as folder:
        if cell.kind == 'plain':
            return run_plain(reference, Path(folder))
        pairs = dict(
            self=(reference, reference),
            teacher=(partner, reference),
            student=(reference, partner),
        )
        assert cell.size is not None
        return run_pair(*pairs[cell.kind], Path(folder), cell.size)


def _child(
    work: Callable[[Cell], dict],
    cell: Cell,
    memory: int,
    log: Path,
    pipe: Connection,
) -> None:
    with log.open('w') as file:
        with (
            contextlib.redirect_stdout(file),
            contextlib.redirect_stderr(file),
            warnings.catch_warnings(),
        ):
            resource.setrlimit(resource.RLIMIT_DATA, (memory << 30,) * 2)
            try:
                found = work(cell)
            except Exception as error:
                traceback.print_exc()
                found = dict(result='fails', detail=describe(error))
    pipe.send(found)


class Child:
    """A cell in a process of its own.

    Forked: the hosts are imported once, by the parent, which runs no model.

    Args:
        cell: What to try.
        work: How.
        timeout: Seconds that it may take.
        memory: GiB that it may take.
        logs: Folder of what it prints.
    """

    def __init__(
        self,
        cell: Cell,
        work: Callable[[Cell], dict] = try_cell,
        timeout: float = TIMEOUT_S,
        memory: int = MEMORY_GIB,
        *,
        logs: Path,
    ) -> None:
        context = multiprocessing.get_context('fork')
        self.cell, self.timeout = cell, timeout
        self.pipe, end = context.Pipe(duplex=False)
        log = logs / f'{cell.family.replace("::", "_")}-{cell.kind}.log'
        self._process = context.Process(
            target=_child, args=(work, cell, memory, log, end)
        )
        self._start = time.monotonic()
        self._process.start()
        end.close()

    def is_done(self) -> bool:
        """Whether :meth:`result` returns at once."""
        return self.pipe.poll() or self._left() <= 0

    def _left(self) -> float:
        return self.timeout - (time.monotonic() - self._start)

    def _failed(self, detail: str) -> dict[str, Any]:
        # A plain model is the host's own.
        result = 'host' if self.cell.kind == 'plain' else 'fails'
        return dict(result=result, detail=detail)

    def result(self) -> dict[str, Any]:
        """Wait for what became of it; one that died or hung has failed."""
        try:
            if self.pipe.poll(max(self._left(), 0)):
                found = self.pipe.recv()
            else:
                found = self._failed(f'not done in {self.timeout:g} s')
                self._process.kill()
        except EOFError:
            self._process.join()
            code = self._process.exitcode
            found = self._failed(f'the process ended with {code}')
        self._process.join()
        self.pipe.close()
        return found


# -- results ------------------------------------------------------------------


class Results:
    """What was found: a file of JSON lines.

    The first line names the hosts and the families to try, each other line
    is a cell. It is written anew after every cell, so that a sweep goes on
    where it was stopped.

    Args:
        path: The file.
        hosts: Names and versions of the hosts. None: those of the file.
        families: What there is to try. None: as in the file.

    Raises:
        UserError: It holds results of other hosts.
    """

    def __init__(
        self,
        path: Path,
        hosts: str | None = None,
        families: Sequence[str] | None = None,
    ) -> None:
        self.path = path
        self.cells: dict[tuple[str, str], dict[str, Any]] = {}
        head: dict[str, Any] = dict(hosts='', families=[])
        if path.exists():
            first, *lines = path.read_text().splitlines()
            head = json.loads(first)
            if hosts not in (None, head['hosts']):
                raise UserError(
                    f'--results: {path} holds results of {head["hosts"]}, '
                    f'but installed are {hosts}. Give another file to start '
                    'afresh.'
                )
            for record in map(json.loads, lines):
                self.cells[record['family'], record['cell']] = record
        self.hosts = head['hosts'] if hosts is None else hosts
        self.families = head['families'] if families is None else families

    def add(self, cell: 'Cell', found: Mapping[str, Any]) -> None:
        """Keep what became of a cell, and write the file."""
        self.cells[cell.key] = dict(
            family=cell.family, config=cell.config, cell=cell.kind, **found
        )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        records = [dict(hosts=self.hosts, families=self.families)]
        for cells in self.by_family().values():
            records += [cells[kind] for kind in CELLS if kind in cells]
        part = self.path.with_name(f'{self.path.name}.part')
        part.write_text(''.join(json.dumps(r) + '\n' for r in records))
        part.replace(self.path)

    def by_family(self) -> dict[str, dict[str, dict]]:
        """Results of each family by kind of cell; none where not tried."""
        families: dict[str, dict[str, dict]] = {f: {} for f in self.families}
        for (family, kind), record in self.cells.items():
            if family in families:
                families[family][kind] = record
        return families


def finish(
    cells: Sequence[Cell], jobs: int, **limits: Any
) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Run cells, some at a time; gives each with what became of it."""
    waiting, running = list(cells), []
    while waiting or running:
        while waiting and len(running) < jobs:
            running.append(Child(waiting.pop(0), **limits))
        wait([child.pipe for child in running], timeout=1)
        for child in [child for child in running if child.is_done()]:
            running.remove(child)
            yield child.cell, child.result()


def sweep(args: argparse.Namespace) -> None:
    """Try what has no result yet, or what was asked for."""
    # Before the processes part, so that each need not.
    import mmdet.apis
    import mmdet.testing  # noqa: F401
    import torch
    from mmdet.utils import register_all_modules
    from mmpretrain.utils import register_all_modules as register_classifiers

    import era_mm.engine.make_config  # noqa: F401

    register_all_modules(init_default_scope=False)
    register_classifiers(init_default_scope=False)

    torch.set_num_threads(1)
    args.logs.mkdir(parents=True, exist_ok=True)
    configs = {
        family: config
        for host in PARTNERS
        for family in folders(host)
        if (config := config_of(family)) is not None
    }
    results = Results(args.results, host_versions(), list(configs))

    def is_wanted(cell: Cell) -> bool:
        known = results.cells.get(cell.key)
        if known is None or known['config'] != cell.config:
            # Without the plain model there is nothing to go on from.
            return cell.kind in ('plain', *args.cells)
        again = args.only and not (args.failed and known['result'] == 'works')
        return bool(again) and cell.kind in args.cells

    def run(*cells: Cell) -> None:
        for cell, found in finish(
            [cell for cell in cells if is_wanted(cell)],
            args.jobs,
            timeout=args.timeout,
            memory=args.memory,
            logs=args.logs,
        ):
            results.add(cell, found)
            print(*cell.key, found['result'], found.get('detail', ''))
            sys.stdout.flush()

    for family, config in configs.items():
        if not _is_asked(family, args.only):
            continue
        run(Cell(family, config, 'plain'))
        plain = results.cells[family, 'plain']
        if plain['result'] == 'works':
            size = tuple(plain['size'])
            run(*(Cell(family, config, kind, size) for kind in CELLS[1:]))


def _is_asked(family: str, only: Sequence[str]) -> bool:
    return not only or family in only or family.partition('::')[2] in only


# -- the table ----------------------------------------------------------------

SHOWN = {
    'plain': 'plain',
    'self': 'with itself',
    'teacher': 'as teacher',
    'student': 'as student',
}
HEADER = """\
# The hosts' model zoos

Which models of the hosts' own zoos can be distilled, tried out family by
family: one config of each folder of `.mim/configs`, alone and in three pairs.
`tools/sweep_zoo.py` wrote this page; it is not edited by hand.

Hosts: {hosts}.

{counts}

A family counts where its own plain model runs here. It *works* where all its
pairs do; it is *refused* where one pair is, with a reason; it *fails* where
anything else goes wrong.

Columns:

- **plain**: the host's own model: two training steps and a prediction for each
  image.
- **with itself**: student and teacher from two copies of the config.
- **as teacher**: of a {detector} or {classifier} student.
- **as student**: of the same as a teacher.
- In a pair, `make_config` writes the config (method `era`), and the model that
  it describes makes two training steps, with the optimiser of the student's
  config, and predicts each image. *works, TWI*: the teacher's head is reused;
  *works*: it is not, for one of the reasons below the table.

All on a CPU, on batches of {batch} images of noise with random weights, so
that nothing is downloaded. Batch norms of backbone and neck have the
statistics of such a batch, with variances of 1 at least. As many images are
predicted at once as the config's test loader gives. Detectors get the first
of {sizes} (height x width) that the plain model takes. Changed in the configs:
pre-trained weights left out; SyncBN made BN (it needs a GPU);
`BatchFixedSizePad` and `BatchResize` set to the images' size; mixed precision
turned off; learning rates of 1e-5 and gradients clipped to a norm of 1,
because with random weights they may be of any size; and to save time
{most} at most.
Each trial has a process of its own, {memory} GiB and {timeout} s at most.

Of a folder the config of the smallest model by its name: the one with the
first of these words, then the shortest, then by the alphabet: {words}.
Chosen otherwise:

{chosen}

To regenerate: `python tools/sweep_zoo.py`, or one family again with
`--only mmdet::fcos`; results are kept in `results/zoo.jsonl`, and
`--table-only` writes the page from them.
"""


def verdict(cells: Mapping[str, Mapping]) -> str:
    """What a family's results come to.

    Args:
        cells: By kind.

    Returns:
        'works', 'refused', 'fails', 'host' (it does not run here) or 'open'
        (not all was tried).
    """
    found = [cells.get(kind, {}).get('result', 'open') for kind in CELLS]
    if found[0] != 'works':
        return str(found[0])
    for result in ('fails', 'open', 'refused'):
        if result in found:
            return result
    return 'works'


def count(families: Mapping[str, Mapping]) -> str:
    """The table of counts."""
    rows = [
        '| host | families that run | works | refused | fails | host does not '
        'run here | not yet wholly tried |',
        '| --- | ---: | ---: | ---: | ---: | ---: | ---: |',
    ]
    for host in PARTNERS:
        found = [
            verdict(cells)
            for family, cells in families.items()
            if family.startswith(f'{host}::')
        ]
        if not found:
            continue
        runs = [v for v in found if v not in ('host', 'open')]
        works = runs.count('works')
        share = f'{100 * works / len(runs):.1f} %' if runs else '-'
        rows.append(
            f'| {host} | {len(runs)} | {works} ({share}) | '
            f'{runs.count("refused")} | {runs.count("fails")} | '
            f'{found.count("host")} | {found.count("open")} |'
        )
    return '\n'.join(rows)


def _shown(record: Mapping | None) -> str:
    if record is None:
        return '-'
    if record['result'] == 'host':
        return 'host does not run here'
    if record.get('twi'):
        return 'works, TWI'
    return str(record['result'])


def _escaped(text: str) -> str:
    return text.replace('|', '\\|').replace('<', '&lt;')


def _reasons(families: Mapping[str, Mapping]) -> Iterator[str]:
    for family, cells in families.items():
        for kind in CELLS:
            record = cells.get(kind)
            if record and record['result'] != 'works':
                yield (
                    f'- `{family}`, {SHOWN[kind]}: {_shown(record)}: '
                    f'{_escaped(record["detail"])}'
                )


def _without_twi(families: Mapping[str, Mapping]) -> list[str]:
    """A line for each reason, with the families of each kind of pair."""
    found: dict[str, dict[str, list[str]]] = {}
    for family, cells in families.items():
        for kind in CELLS[1:]:
            record = cells.get(kind)
            if record and record['result'] == 'works' and not record['twi']:
                reason = record['detail'].removeprefix('not reused: ')
                kinds = found.setdefault(reason, {})
                kinds.setdefault(SHOWN[kind], []).append(f'`{family}`')
    return [
        f'- {_escaped(reason)}: '
        + '; '.join(f'{kind} {", ".join(of)}' for kind, of in kinds.items())
        for reason, kinds in found.items()
    ]


def page(results: Results) -> str:
    """The whole of ``docs/zoo.md``."""
    families = results.by_family()
    text = HEADER.format(
        hosts=results.hosts,
        counts=count(families),
        detector=Path(PARTNERS['mmdet']).stem,
        classifier=Path(PARTNERS['mmpretrain']).stem,
        batch=BATCH,
        sizes=', '.join(f'{height}x{width}' for height, width in SIZES),
        most=', '.join(f'`{key}={most}`' for key, most in MOST.items()),
        memory=MEMORY_GIB,
        timeout=TIMEOUT_S,
        words=', '.join(SMALL_FIRST),
        chosen='\n'.join(
            f'- `{family}`: `{config}` ({reason})'
            for family, (config, reason) in sorted(CHOSEN.items())
        ),
    )
    parts = [text]
    for host in PARTNERS:
        own = {
            family: cells
            for family, cells in families.items()
            if family.startswith(f'{host}::')
        }
        rows = [
            f'| `{family.partition("::")[2]}` '
            f'| `{next(iter(cells.values()))["config"].partition("/")[2]}` | '
            + ' | '.join(_shown(cells.get(kind)) for kind in CELLS)
            + ' |'
            for family, cells in own.items()
            if cells
        ]
        waiting = [
            f'`{f.partition("::")[2]}`' for f, c in own.items() if not c
        ]
        if waiting:
            rows.append(f'\nNot tried yet: {", ".join(waiting)}.')
        left_out = [
            f'- `{family.partition("::")[2]}`: {reason}'
            for family, reason in LEFT_OUT.items()
            if family.startswith(f'{host}::')
        ]
        heads = ['family', 'config', *SHOWN.values()]
        parts += [
            f'## {host}\n',
            f'| {" | ".join(heads)} |\n|{" --- |" * len(heads)}\n'
            + '\n'.join(rows)
            + '\n',
            f'### Left out of {host}\n',
            '\n'.join(left_out) + '\n',
        ]
    for title, lines in (
        ('What does not work', list(_reasons(families))),
        ("Where the teacher's head is not reused", _without_twi(families)),
    ):
        parts += [f'## {title}\n', '\n'.join(lines) or 'Nothing.', '']
    return '\n'.join(parts).rstrip() + '\n'


def host_versions() -> str:
    """Distributions of the hosts, with versions."""
    import mmcv
    import mmdet
    import mmengine
    import mmpretrain
    import torch

    modules = (mmdet, mmpretrain, mmengine, mmcv, torch)
    by_module = importlib.metadata.packages_distributions()
    return ', '.join(
        f'{by_module[m.__name__][0]} '
        f'{importlib.metadata.version(by_module[m.__name__][0])}'
        for m in modules
    )


# -- the command --------------------------------------------------------------


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        '--only',
        nargs='+',
        default=[],
        metavar='NAME',
        help='families to try again: mmdet::fcos, or fcos',
    )
    parser.add_argument(
        '--cells',
        nargs='+',
        default=CELLS,
        choices=CELLS,
        help='try these alone, and the plain model where it is new',
    )
    parser.add_argument(
        '--failed',
        action='store_true',
        help='of --only, try again what does not work',
    )
    parser.add_argument(
        '--table-only', action='store_true', help='only write the page'
    )
    parser.add_argument('--jobs', type=int, default=1)
    parser.add_argument('--timeout', type=float, default=TIMEOUT_S)
    parser.add_argument(
        '--memory', type=int, default=MEMORY_GIB, help='GiB of a trial'
    )
    parser.add_argument('--out', type=Path, default=ROOT / 'docs/zoo.md')
    parser.add_argument(
        '--results', type=Path, default=ROOT / 'results/zoo.jsonl'
    )
    parser.add_argument(
        '--logs',
        type=Path,
        default=ROOT / 'work_dirs/sweep_zoo',
        help='what the trials print',
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool."""
    args = parse_args(argv)
    try:
        if not args.table_only:
            sweep(args)
        args.out.write_text(page(Results(args.results)))
    except UserError as error:
        print(f'error: {error}', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
