"""Every config parses, knows its keys, and the flagship really builds."""

import ast
import copy
import inspect
import re
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import HOOKS, MODELS, init_default_scope
from mmengine.runner import Runner

from era_mm.core import extras_of
from era_mm.engine.preflight import find_config
from era_mm.engine.step_cost import cost_line
from era_mm.testing import save_teacher, write_coco
from era_mm.testing.toy import CLASSES

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / 'configs').rglob('*.py'))
CONFIGS = [file for file in FILES if '_base_' not in file.parts]
DISTILLED = [file for file in CONFIGS if not file.name.startswith('plain_')]


def by_name(file):
    return file.stem


def test_names__are_unique_identifiers():
    # mim searches a config by its base name through the whole package.
    stems = [file.stem for file in FILES]
    assert len(set(stems)) == len(stems)
    assert all(stem.isidentifier() for stem in stems)


@pytest.mark.parametrize('file', CONFIGS, ids=by_name)
def test_config__is_found_by_its_base_name(file):
    assert find_config(file.stem) == find_config(file.name) == str(file)


def test_flagship__stays_where_its_launch_command_says():
    # All others lie in the folder of their method.
    folder = ROOT / 'configs'
    assert [file.name for file in folder.glob('*.py')] == [
        'era_retinanet_r101_r50.py'
    ]


def unknown_keys(cfg, registry):
    """Keys that the constructor of a config's type does not have."""
    found = []
    if isinstance(cfg, (list, tuple)):
        for item in cfg:
            found += unknown_keys(item, registry)
    elif isinstance(cfg, dict):
        kind = cfg.get('type')
        if isinstance(kind, str) and kind.startswith('era_mm.'):
            cls = registry.get(kind)
            assert cls is not None, kind
            parameters = inspect.signature(cls).parameters
            # One that hands keys on to a class of the host's takes any.
            hands_on = any(
                p.kind == p.VAR_KEYWORD for p in parameters.values()
            )
            found += [
                f'{kind}: {key}'
                for key in cfg
                if key not in {*parameters, 'type', '_scope_'} and not hands_on
            ]
        for item in cfg.values():
            found += unknown_keys(item, registry)
    return found


@pytest.mark.parametrize('file', CONFIGS, ids=by_name)
def test_config__has_no_unknown_key_and_says_how_to_launch(file, read_config):
    cfg = read_config(file)
    init_default_scope(cfg.default_scope)
    assert not unknown_keys(cfg.model, MODELS)
    assert not unknown_keys(cfg.get('custom_hooks', []), HOOKS)
    # Without it the host knows no type of ours. Not in a plain config with a
    # network of ours: mmengine refuses a key in two of an ERA config's bases.
    if "'era_mm." in str(cfg.to_dict()) and file in DISTILLED:
        assert 'era_mm' in cfg.custom_imports.imports
    head = file.read_text().partition('_base_')[0]
    assert file.stem in head
    assert re.search(r'mim train era_mm|python tools/train.py', head)


@pytest.mark.parametrize('file', DISTILLED, ids=by_name)
def test_config__has_a_twin_with_the_same_schedule_data_and_seed(
    file, read_config
):
    cfg = read_config(file)
    named = re.search(r'Plain twin: (\w+)\.py', file.read_text())
    assert named, 'the first comment must name the plain twin'
    twin = read_config(ROOT / f'configs/plain/{named[1]}.py')
    if 'students' in cfg.model:
        # Two students, each with such an optimiser: the first's twin.
        assert twin.model == next(iter(cfg.model.students.values()))
        del cfg.optim_wrapper['constructor']
    else:
        student = copy.deepcopy(cfg.model.student)
        if re.match('era_.*_cifar100', file.stem):
            # As released; see `test_configs_zoo.py`.
            student.head.loss.loss_weight = 1.0
        assert twin.model == student
        twin = begun_later(twin, cfg)
    own = ['model', 'custom_hooks', 'custom_imports']
    if 'distiller' in cfg.model and 'phases' in cfg.model.distiller:
        # A cycle of rates for each phase.
        own.append('param_scheduler')
    for key in set(cfg) | set(twin):
        if key not in own:
            assert cfg.get(key) == twin.get(key), key


def begun_later(twin, cfg):
    """The twin as it would begin after the pre-training phase of a config.

    A phase takes whole epochs, and the student's own schedule follows it.
    """
    iters = cfg.model.distiller.get('pretrain_iters', 0)
    if not iters:
        return twin
    twin = copy.deepcopy(twin)
    epochs = cfg.train_cfg.max_epochs - twin.train_cfg.max_epochs
    if twin.train_cfg.val_interval == twin.train_cfg.max_epochs:
        twin.train_cfg.val_interval += epochs
    twin.train_cfg.max_epochs += epochs
    steps = twin.param_scheduler
    for step in steps if isinstance(steps, list) else [steps]:
        shift = epochs if step.get('by_epoch', True) else iters
        step.begin = step.get('begin', 0) + shift
        if 'end' in step:
            step.end += shift
    return twin


@pytest.mark.parametrize(
    'file',
    [
        file
        for file in DISTILLED
        if ('digit' in file.stem or 'letters' in file.stem)
        and not file.stem.startswith(('dml_', 'ie_dml_', 't2b_'))
    ],
    ids=by_name,
)
def test_made_data__teacher_file_is_what_its_training_writes(
    file, read_config
):
    cfg = read_config(file)
    teacher = read_config(Path(cfg.model.teacher.config).resolve())
    stem = Path(cfg.model.teacher.config).stem
    epochs = teacher.train_cfg.max_epochs
    assert cfg.model.teacher.checkpoint == (
        f'work_dirs/{stem}/epoch_{epochs}.pth'
    )


def test_flagship__is_what_its_docs_say():
    cfg = Config.fromfile(ROOT / 'configs/era_retinanet_r101_r50.py')
    assert cfg.model.student.type == 'RetinaNet'
    assert cfg.model.student.backbone.depth == 50
    assert 'retinanet_r101_fpn_2x_coco' in cfg.model.teacher.config
    assert cfg.model.teacher.checkpoint.startswith('https://')
    assert cfg.train_cfg.max_epochs == 24
    assert cfg.optim_wrapper.optimizer.lr == 0.01
    assert cfg.optim_wrapper.clip_grad.max_norm == 35
    assert cfg.train_dataloader.dataset.data_root == 'data/coco/'
    assert (
        len(
            (ROOT / 'configs/era_retinanet_r101_r50.py')
            .read_text()
            .splitlines()
        )
        <= 30
    )


@pytest.mark.slow
def test_flagship__builds_steps_and_saves_on_tiny_images(tmp_path):
    """All of it but the data and the weights: R101 teaches R50."""
    cfg = Config.fromfile(ROOT / 'configs/era_retinanet_r101_r50.py')
    teacher = Config.fromfile(
        ROOT.joinpath('configs/plain/plain_retinanet_r50.py')
    ).model
    teacher.backbone.depth = 101
    teacher.backbone.init_cfg = None
    cfg.model.teacher.checkpoint = save_teacher(
        teacher.to_dict(), tmp_path / 'r101.pth'
    )
    cfg.model.student.backbone.init_cfg = None
    root = write_coco(tmp_path / 'coco', num_images=2)
    for name in ('train', 'val', 'test'):
        loader = cfg[f'{name}_dataloader']
        loader.num_workers = 0
        loader.persistent_workers = False
        loader.dataset |= dict(
            data_root=root,
            ann_file='annotations.json',
            data_prefix=dict(img='images/'),
            metainfo=dict(classes=CLASSES),
        )
        resize = [t for t in loader.dataset.pipeline if t['type'] == 'Resize']
        resize[0].scale = (128, 96)
    cfg.test_evaluator.ann_file = f'{root}/annotations.json'
    # An 80-class prediction has no place in a 3-class annotation file.
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    cfg.default_hooks.checkpoint.save_best = None
    cfg.train_cfg.max_epochs = 1
    cfg.work_dir = str(tmp_path / 'run')
    cfg.visualizer.vis_backends = []
    runner = Runner.from_cfg(cfg)
    runner.train()
    # R50's forward and backward pass, R101's forward pass, and the branches.
    (ratio,) = re.findall(
        r'^a step costs about (\d\.\d\d) times the plain one',
        str(cost_line(runner.model)),
    )
    assert 1.5 < float(ratio) < 2.5

    state = torch.load(tmp_path / 'run/epoch_1.pth', weights_only=False)
    plain = MODELS.build(cfg.model.student)
    plain.load_state_dict(state['state_dict'], strict=True)
    assert extras_of(state['state_dict'])['distiller']['type'] == (
        'ERADistiller'
    )


# -- the layout's rules ---------------------------------------------------


def imports_of(file):
    """Packages of era_mm that a module imports, as dotted parts."""
    package = ['era_mm', *file.relative_to(ROOT / 'era_mm').parts[:-1]]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1]
            base = base if node.level else []
            yield [*base, *(node.module or '').split('.')]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name.split('.')


@pytest.mark.parametrize(
    ('folder', 'allowed'),
    [
        ('layers', {'registry', 'layers'}),
        ('core', {'registry', 'core', 'errors', 'layers'}),
        ('heads', {'registry', 'core', 'heads', 'layers'}),
    ],
)
def test_imports__point_one_way(folder, allowed):
    for file in (ROOT / 'era_mm' / folder).rglob('*.py'):
        for parts in imports_of(file):
            if parts[0] == 'era_mm' and len(parts) > 1:
                assert parts[1] in allowed, f'{file.name}: {parts}'


#: Methods that are another with other defaults.
SAME_METHOD = {'pkd': 'feature_imitation'}


def test_imports__methods_do_not_know_each_other():
    for file in (ROOT / 'era_mm/methods').rglob('*.py'):
        method = file.relative_to(ROOT / 'era_mm/methods').parts[0]
        method = method.removesuffix('.py')
        for parts in imports_of(file):
            if parts[:2] == ['era_mm', 'methods'] and len(parts) > 2:
                assert parts[2] in (method, SAME_METHOD.get(method)), file
