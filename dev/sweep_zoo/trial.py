"""One trial: a family's model, alone or in a pair, in a process of its own."""

import contextlib
import math
import multiprocessing
import re
import resource
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

from dev.sweep_zoo.families import PARTNERS, config_folder
from era_mm.errors import UserError

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
    """A batch of noise, of the size that a config's pipeline outputs."""
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
