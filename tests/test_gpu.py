"""What only a GPU can show. Skipped without one.

python -m pytest -m gpu
"""

import contextlib
import copy
import gc
import os

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner, load_checkpoint, save_checkpoint
from torch import nn

from era_mm import testing
from era_mm.engine.benchmark import Options, measure
from era_mm.engine.benchmark_models import Distilled
from era_mm.engine.random_batch import random_batch
from era_mm.methods.era.space import FirstBatches

# cuBLAS reads it once; its matrix products are the same in every run then.
os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU'),
]

GPU = torch.device('cuda')
ERA = dict(type='era_mm.ERADistiller')
KINDS = ['dense', 'two_stage', 'classifier']


@pytest.fixture(autouse=True)
def _full_precision():
    kept = (
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.allow_tf32,
    )
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = (
        kept
    )


def build(kind, folder, distiller=ERA):
    """A pair of toys, in train mode, on the CPU."""
    scope = 'mmpretrain' if kind == 'classifier' else 'mmdet'
    init_default_scope(scope)
    make = dict(
        dense=testing.detector_config,
        two_stage=testing.two_stage_config,
        classifier=testing.classifier_config,
    )[kind]
    if kind == 'two_stage':
        # By labels, a sampler of the host draws on the device.
        distiller = distiller | dict(twi_targets='teacher')
    wide = dict(width=16)
    if kind != 'classifier':
        wide['channels'] = 24
    teacher = make(**wide)
    file = testing.save_teacher(teacher, folder / f'{kind}.pth', scope)
    torch.manual_seed(0)
    model = MODELS.build(
        testing.distillation_config(
            copy.deepcopy(distiller), make(), teacher, file
        )
    )
    model.init_weights()
    return model.train()


def batch(kind):
    if kind != 'classifier':
        return testing.detection_batch(4)
    from mmpretrain.structures import DataSample

    generator = torch.Generator().manual_seed(0)
    return dict(
        inputs=[
            torch.randint(0, 256, (3, 64, 64), generator=generator).byte()
            for _ in range(8)
        ],
        data_samples=[DataSample().set_gt_label(i % 3) for i in range(8)],
    )


def terms_and_gradients(model, kind, amp=None):
    """ERA's own terms, and their gradients in the student."""
    model.zero_grad()
    data = model.data_preprocessor(batch(kind), True)
    device = next(model.parameters()).device.type
    with torch.autocast(device, dtype=amp, enabled=amp is not None):
        losses = model(**data, mode='loss')
    terms = {k: v for k, v in losses.items() if k.startswith('loss_era')}
    assert terms
    sum(terms.values()).backward()
    gradients = {
        name: parameter.grad.detach().cpu().clone()
        for name, parameter in model.student.named_parameters()
        if parameter.grad is not None
    }
    return {k: v.detach().cpu() for k, v in terms.items()}, gradients


@pytest.mark.parametrize('kind', KINDS)
def test_step__equals_the_cpus(kind, tmp_path):
    model = build(kind, tmp_path)
    # Not a copy: an averaged student shares the extras.
    other = build(kind, tmp_path).to(GPU)
    expected, gradients = terms_and_gradients(model, kind)
    found, found_gradients = terms_and_gradients(other, kind)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-4, atol=1e-6, msg=name
        )
    assert found_gradients.keys() == gradients.keys()
    for name, value in gradients.items():
        scale = value.abs().max().clamp(min=1e-6)
        torch.testing.assert_close(
            found_gradients[name] / scale,
            value / scale,
            rtol=0,
            atol=1e-3,
            msg=name,
        )


def refused(kind, dtype):
    """mmcv's RoIAlign does not know bfloat16 on a GPU."""
    if kind == 'two_stage' and dtype in (torch.bfloat16, 'bfloat16'):
        return pytest.raises(NotImplementedError, match='roi_align')
    return contextlib.nullcontext()


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('kind', KINDS)
def test_amp__is_finite_and_near(kind, dtype, tmp_path):
    model = build(kind, tmp_path).to(GPU)
    expected, _ = terms_and_gradients(build(kind, tmp_path).to(GPU), kind)
    with refused(kind, dtype) as refusal:
        found, gradients = terms_and_gradients(model, kind, amp=dtype)
    if refusal is not None:
        return
    for name, value in expected.items():
        assert found[name].isfinite(), name
        torch.testing.assert_close(
            found[name].float(), value.float(), rtol=0.1, atol=0.02, msg=name
        )
    if dtype is torch.bfloat16:
        # fp16 needs the loss scale of the optimiser's wrapper.
        assert all(value.isfinite().all() for value in gradients.values())


@pytest.mark.parametrize('amp', ['float16', 'bfloat16'])
@pytest.mark.parametrize('kind', KINDS)
def test_amp__train_steps_of_the_host(kind, amp, tmp_path):
    model = build(kind, tmp_path).to(GPU)
    wrapper = build_optim_wrapper(
        model,
        dict(
            type='AmpOptimWrapper',
            dtype=amp,
            optimizer=dict(type='SGD', lr=1e-3),
        ),
    )
    before = {k: v.clone() for k, v in model.student.state_dict().items()}
    with refused(kind, amp) as refusal:
        for _ in range(3):
            logs = model.train_step(batch(kind), wrapper)
            assert all(value.isfinite() for value in logs.values())
    if refusal is not None:
        return
    after = model.student.state_dict()
    assert any(not torch.equal(before[k], after[k]) for k in before)
    assert all(
        v.isfinite().all() for v in after.values() if v.is_floating_point()
    )


def test_moves__reach_teacher_and_extras(tmp_path):
    model = build('dense', tmp_path)
    teacher = model.teachers['teacher'].model
    extras = model.distillers['distiller']
    parts = (model.student, teacher, extras)

    model.cuda()
    for part in parts:
        tensors = [*part.parameters(), *part.buffers()]
        assert tensors
        assert {t.device.type for t in tensors} == {'cuda'}
    model.to(memory_format=torch.channels_last)
    for part in parts:
        for module in part.modules():
            if isinstance(module, nn.Conv2d):
                assert module.weight.is_contiguous(
                    memory_format=torch.channels_last
                )
    model.half()
    for part in parts:
        assert {p.dtype for p in part.parameters()} == {torch.float16}
    model.cpu()
    for part in parts:
        assert {t.device.type for t in part.buffers()} == {'cpu'}


@pytest.mark.parametrize('kind', KINDS)
def test_files__go_from_gpu_to_cpu_and_back(kind, tmp_path):
    model = build(kind, tmp_path).to(GPU)
    wrapper = build_optim_wrapper(
        model, dict(optimizer=dict(type='SGD', lr=1e-3))
    )
    model.train_step(batch(kind), wrapper)
    file = str(tmp_path / 'gpu.pth')
    save_checkpoint(dict(state_dict=model.state_dict()), file)
    on_cpu = build(kind, tmp_path)
    load_checkpoint(on_cpu, file, map_location='cpu')
    kept = model.state_dict()
    for name, value in on_cpu.state_dict().items():
        assert torch.equal(value, kept[name].cpu()), name

    save_checkpoint(dict(state_dict=on_cpu.state_dict()), file)
    again = build(kind, tmp_path).to(GPU)
    load_checkpoint(again, file, map_location='cpu')
    for name, value in again.state_dict().items():
        assert value.device.type == 'cuda'
        assert torch.equal(value, kept[name]), name


def test_resume__is_bit_identical(coco, tmp_path):
    def weights(folder, **kwargs):
        torch.manual_seed(0)
        config = testing.run_config(
            testing.distillation_config(dict(ERA)),
            coco,
            tmp_path / folder,
            randomness=dict(seed=0, deterministic=True),
            **kwargs,
        )
        # Flips are drawn anew in a resumed run.
        for step in config.train_dataloader.dataset.pipeline:
            if step['type'] == 'RandomFlip':
                step['prob'] = 0.0
        runner = Runner.from_cfg(Config(config))
        runner.train()
        return {k: v.cpu() for k, v in runner.model.state_dict().items()}

    try:
        whole = weights('whole')
        resumed = weights(
            'resumed',
            resume=True,
            load_from=str(tmp_path / 'whole/epoch_1.pth'),
        )
    finally:
        torch.use_deterministic_algorithms(False)
    assert whole.keys() == resumed.keys()
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


def test_nccl__with_one_rank(tmp_path):
    from mmengine.model import MMDistributedDataParallel

    model = build('dense', tmp_path).to(GPU)
    expected, _ = terms_and_gradients(
        build('dense', tmp_path).to(GPU), 'dense'
    )
    torch.distributed.init_process_group(
        'nccl',
        init_method=f'file://{tmp_path / "store"}',
        rank=0,
        world_size=1,
    )
    try:
        parallel = MMDistributedDataParallel(model, device_ids=[0])
        wrapper = build_optim_wrapper(
            parallel, dict(optimizer=dict(type='SGD', lr=1e-3))
        )
        logs = parallel.train_step(batch('dense'), wrapper)
    finally:
        torch.distributed.destroy_process_group()
    for name, value in expected.items():
        torch.testing.assert_close(logs[name].cpu(), value, msg=name)


def test_benchmark__peak_is_what_a_step_uses(tmp_path):
    teacher = testing.detector_config(width=16, channels=24)
    file = testing.save_teacher(teacher, tmp_path / 'teacher.pth')
    config = Config(
        dict(
            default_scope='mmdet',
            model=testing.distillation_config(
                dict(ERA), testing.detector_config(), teacher, file
            ),
            optim_wrapper=dict(
                type='OptimWrapper',
                optimizer=dict(type='SGD', lr=1e-3, momentum=0.9),
            ),
        )
    )
    options = Options(
        batch_size=4, size=(512, 512), iters=1, warmup=21, device='cuda'
    )
    told = measure([config], options)['distillers'][0]['memory']['peak']

    # The same step alone, by the total of torch's allocator.
    gc.collect()
    before = torch.cuda.memory_allocated()
    alone = Distilled(config, GPU, amp=False)
    batch = random_batch(
        alone.deployed, 4, (512, 512), 5, torch.Generator().manual_seed(0)
    )
    # Not part of a training.
    alone.deployed.cpu()
    for module in alone.model.modules():
        if isinstance(module, FirstBatches):
            module.number = 2
    for _ in range(3):
        alone.step(copy.deepcopy(batch))
    torch.cuda.reset_peak_memory_stats()
    alone.step(copy.deepcopy(batch))
    used = torch.cuda.max_memory_allocated() - before
    assert told == pytest.approx(used, rel=0.1)


@pytest.mark.parametrize('kind', ['dense', 'classifier'])
def test_step__waits_for_nothing(kind, tmp_path):
    # The hosts' assigners may wait for the device; our own code does not. A
    # RoI head's regions are cut to their number, which the host looks up.
    model = build(kind, tmp_path).to(GPU)
    era = model.distillers['distiller']
    # Statistics and units are measured by then.
    for module in era.modules():
        if isinstance(module, FirstBatches):
            module.number = 2
    for _ in range(3):
        terms_and_gradients(model, kind)
    calls = []

    def watched(name):
        loss = getattr(era, name)

        def run(**kwargs):
            calls.append(name)
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode('error')
            try:
                return loss(**kwargs)
            finally:
                torch.cuda.set_sync_debug_mode('default')

        return run

    for name in ('early_loss', 'late_loss', 'loss'):
        setattr(era, name, watched(name))
    terms_and_gradients(model, kind)
    assert (
        calls
        == dict(dense=['early_loss', 'late_loss'], classifier=['loss'])[kind]
    )
