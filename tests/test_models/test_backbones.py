"""The benchmark backbones are the field's: counts, shapes, arithmetic."""

import pytest
import torch
from mmengine.registry import MODELS, init_default_scope
from torch import nn
from torch.nn.functional import (
    avg_pool2d,
    batch_norm,
    conv2d,
    gelu,
    max_pool2d,
    relu,
)

from era_mm.models.backbones.cifar_mobilenet_v2 import InvertedResidual
from era_mm.models.backbones.cifar_shufflenet import ShuffleUnit
from era_mm.models.backbones.cifar_wide_resnet import PreActBlock
from era_mm.models.backbones.cswin import CrossShapedAttention, CSWinBlock


@pytest.fixture(autouse=True)
def scope():
    init_default_scope('mmpretrain')


def build(kind, **kwargs):
    torch.manual_seed(0)
    return MODELS.build(dict(type=kind, **kwargs))


RESNET, WRN = 'era_mm.CIFARResNet', 'era_mm.CIFARWideResNet'
VGG, MOBILE = 'era_mm.CIFARVGG', 'era_mm.CIFARMobileNetV2'
SHUFFLE1, SHUFFLE2 = 'era_mm.CIFARShuffleNetV1', 'era_mm.CIFARShuffleNetV2'

# Parameters with the classifier of 100 classes. Each was counted on the model
# of that name in CRD's published code (HobbitLong/RepDistiller); the papers
# round them: ResNet-20 0.28 M, 56 0.86 M, 110 1.74 M, 8x4 1.23 M, 32x4 7.43 M,
# WRN-16-2 0.70 M, 40-1 0.57 M, 40-2 2.26 M, VGG8 3.97 M, VGG13 9.46 M,
# MobileNetV2 0.81 M, ShuffleNetV1 0.95 M, V2 1.36 M, ResNet-50 23.71 M.
CIFAR = {
    'resnet8': (RESNET, dict(depth=8), 64, 83_892),
    'resnet14': (RESNET, dict(depth=14), 64, 181_108),
    'resnet20': (RESNET, dict(depth=20), 64, 278_324),
    'resnet32': (RESNET, dict(depth=32), 64, 472_756),
    'resnet44': (RESNET, dict(depth=44), 64, 667_188),
    'resnet56': (RESNET, dict(depth=56), 64, 861_620),
    'resnet110': (RESNET, dict(depth=110), 64, 1_736_564),
    'resnet8x4': (RESNET, dict(depth=8, width=4), 256, 1_233_540),
    'resnet32x4': (RESNET, dict(depth=32, width=4), 256, 7_433_860),
    'wrn_16_1': (WRN, dict(depth=16), 64, 180_916),
    'wrn_16_2': (WRN, dict(depth=16, width=2), 128, 703_284),
    'wrn_40_1': (WRN, dict(depth=40), 64, 569_780),
    'wrn_40_2': (WRN, dict(depth=40, width=2), 128, 2_255_156),
    'vgg8': (VGG, dict(depth=8), 512, 3_965_028),
    'vgg11': (VGG, dict(depth=11), 512, 9_277_284),
    'vgg13': (VGG, dict(depth=13), 512, 9_462_180),
    'vgg16': (VGG, dict(depth=16), 512, 14_774_436),
    'vgg19': (VGG, dict(depth=19), 512, 20_086_692),
    'mobilenet_v2': (MOBILE, {}, 1280, 812_836),
    'shufflenet_v1': (SHUFFLE1, {}, 960, 949_258),
    'shufflenet_v2': (SHUFFLE2, {}, 1024, 1_355_528),
    # mmpretrain's own is the field's.
    'resnet50': ('ResNet_CIFAR', dict(depth=50), 2048, 23_705_252),
}


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize('name', CIFAR)
def test_cifar__parameters_are_those_of_the_published_code(name):
    kind, kwargs, channels, published = CIFAR[name]
    classifier = channels * 100 + 100
    assert count(build(kind, **kwargs)) + classifier == published


def test_mobilenet_v1__parameters_are_the_published():
    # 4,231,976 with 1000 classes in the model tables of TensorFlow-Slim and
    # osmr/imgclsmob; the paper (table 8) rounds to 4.2 M.
    model = build('era_mm.MobileNetV1')
    assert count(model) + 1024 * 1000 + 1000 == 4_231_976


@pytest.mark.parametrize(
    ('arch', 'channels', 'published', 'exact'),
    [
        # Millions as the authors' table rounds them; the exact numbers were
        # counted on the models of their code (microsoft/CSWin-Transformer).
        ('tiny', 512, 23, 22_320_552),
        ('small', 512, 35, 34_643_304),
        ('base', 768, 78, 77_382_184),
    ],
)
def test_cswin__parameters_are_those_of_the_published_code(
    arch, channels, published, exact
):
    with torch.device('meta'):
        model = build('era_mm.CSWinTransformer', arch=arch)
    found = count(model) + channels * 1000 + 1000
    assert found == exact
    assert abs(found / 1e6 - published) < 1


def stage_shapes(model, stages, size):
    """What each stage outputs, without the batch, and the model's output."""
    shapes = []
    handles = [
        stage.register_forward_hook(
            lambda module, args, out: shapes.append(tuple(out.shape[1:]))
        )
        for stage in stages
    ]
    with torch.no_grad():
        (out,) = model(torch.zeros(2, 3, size, size))
    for handle in handles:
        handle.remove()
    return [*shapes, tuple(out.shape[1:])]


@pytest.mark.parametrize(
    ('kind', 'kwargs', 'stages', 'expected'),
    [
        (
            RESNET,
            dict(depth=8, width=4),
            ['relu', 'layer1', 'layer2', 'layer3'],
            # The stem's ReLU, then the stages.
            [(32, 32, 32), (64, 32, 32), (128, 16, 16), (256, 8, 8)],
        ),
        (
            WRN,
            dict(depth=16, width=2),
            ['conv1', 'stages.0', 'stages.1', 'stages.2'],
            [(16, 32, 32), (32, 32, 32), (64, 16, 16), (128, 8, 8)],
        ),
        (
            VGG,
            dict(depth=13),
            [f'stages.{i}' for i in range(5)],
            # Pooled after the first three.
            [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4)],
        ),
        (
            SHUFFLE1,
            {},
            ['conv1', 'stages.0', 'stages.1', 'stages.2'],
            [(24, 32, 32), (240, 16, 16), (480, 8, 8), (960, 4, 4)],
        ),
        (
            SHUFFLE2,
            {},
            ['conv1', 'layers.0', 'layers.1', 'layers.2', 'layers.3'],
            [
                (24, 32, 32),
                (116, 16, 16),
                (232, 8, 8),
                (464, 4, 4),
                (1024, 4, 4),
            ],
        ),
        # 24, 240, 480 and 960 times 0.3 are 7.2, 72, 144 and 288; three
        # groups divide 6, 72, 144 and 288.
        (
            SHUFFLE1,
            dict(widen_factor=0.3),
            ['conv1', 'stages.0', 'stages.1', 'stages.2'],
            [(6, 32, 32), (72, 16, 16), (144, 8, 8), (288, 4, 4)],
        ),
        # 24, 116, 232, 464 and 1024 times 0.3 are 7.2, 34.8, 69.6, 139.2 and
        # 307.2; a unit halves its channels.
        (
            SHUFFLE2,
            dict(widen_factor=0.3),
            ['conv1', 'layers.0', 'layers.1', 'layers.2', 'layers.3'],
            [
                (7, 32, 32),
                (34, 16, 16),
                (68, 8, 8),
                (138, 4, 4),
                (307, 4, 4),
            ],
        ),
        (
            MOBILE,
            {},
            ['conv1', *[f'stages.{i}' for i in range(7)], 'conv2'],
            [
                (16, 16, 16),
                (8, 16, 16),
                (12, 16, 16),
                (16, 8, 8),
                (32, 4, 4),
                (48, 4, 4),
                (80, 2, 2),
                (160, 2, 2),
                (1280, 2, 2),
            ],
        ),
    ],
    ids=[
        'resnet',
        'wrn',
        'vgg',
        'shufflenet_v1',
        'shufflenet_v2',
        'narrow_shufflenet_v1',
        'narrow_shufflenet_v2',
        'mobile',
    ],
)
def test_cifar__stages_have_the_published_widths_and_strides(
    kind, kwargs, stages, expected
):
    model = build(kind, **kwargs)
    model.eval()
    found = stage_shapes(model, [model.get_submodule(s) for s in stages], 32)
    assert found[: len(expected)] == expected
    assert found[-1] == expected[-1]


def test_mobilenet_v1__layers_have_the_published_widths_and_strides():
    model = build('era_mm.MobileNetV1')
    model.eval()
    found = stage_shapes(model, list(model.layers), 64)
    widths = [32, 64, 128, 128, 256, 256, *[512] * 6, 1024, 1024]
    sizes = [32, 32, 16, 16, 8, 8, *[4] * 6, 2, 2]
    assert found[:-1] == [
        (width, size, size) for width, size in zip(widths, sizes, strict=True)
    ]
    assert found[-1] == (1024, 2, 2)


# -- the arithmetic, against slow references --------------------------------


def unusual(module):
    """Double precision, eval, and norms that are not the identity."""
    module.double()
    module.eval()
    generator = torch.Generator().manual_seed(1)
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for tensor in (norm.weight, norm.bias, norm.running_mean):
                values = torch.randn(
                    tensor.shape, generator=generator, dtype=torch.float64
                )
                tensor.data.copy_(values)
            norm.running_var.fill_(1.7)
    return module


def images(*shape):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def bn(norm, x):
    return batch_norm(
        x,
        norm.running_mean,
        norm.running_var,
        norm.weight,
        norm.bias,
        eps=1e-5,
    )


def agree(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize(('out', 'stride'), [(6, 1), (10, 1), (10, 2)])
def test_wrn__block_is_pre_activated_with_the_shortcut_behind_the_relu(
    out, stride
):
    block = unusual(PreActBlock(6, out, stride))
    x = images(2, 6, 8, 8)
    active = relu(bn(block.norm1, x))
    y = conv2d(active, block.conv1.weight, stride=stride, padding=1)
    y = conv2d(relu(bn(block.norm2, y)), block.conv2.weight, padding=1)
    identity = x
    if out != 6:
        identity = conv2d(active, block.shortcut.weight, stride=stride)
    agree(block(x), identity + y)


@torch.no_grad()
@pytest.mark.parametrize(
    ('channels', 'out', 'stride'), [(24, 24, 1), (6, 30, 2)]
)
def test_shufflenet_v1__unit_shuffles_and_joins(channels, out, stride):
    unit = unusual(ShuffleUnit(channels, out, stride, 3, first_groups=3))
    x = images(2, channels, 8, 8)
    # A quarter of the 24 channels that the unit adds by itself; the cards of
    # three hands are dealt in turn.
    y = relu(bn(unit.norm1, conv2d(x, unit.conv1.weight, groups=3)))
    y = y[:, [0, 2, 4, 1, 3, 5]]
    y = conv2d(y, unit.conv2.weight, stride=stride, padding=1, groups=6)
    y = relu(bn(unit.norm2, y))
    y = bn(unit.norm3, conv2d(y, unit.conv3.weight, groups=3))
    if stride == 1:
        agree(unit(x), relu(x + y))
    else:
        shortcut = avg_pool2d(x, 3, stride=2, padding=1)
        agree(unit(x), relu(torch.cat([y, shortcut], dim=1)))


@torch.no_grad()
def test_shufflenet_v1__only_the_first_unit_is_ungrouped():
    model = build(SHUFFLE1)
    groups = [
        [(unit.conv1.groups, unit.conv3.groups) for unit in stage]
        for stage in model.stages
    ]
    assert groups[0][0] == (1, 3)
    assert {g for stage in groups for g in stage} == {(1, 3), (3, 3)}
    assert sum(g == (1, 3) for stage in groups for g in stage) == 1


@torch.no_grad()
@pytest.mark.parametrize(
    ('out', 'stride', 'expansion'), [(4, 1, 6), (4, 2, 6), (6, 1, 1)]
)
def test_mobilenet_v2__block_is_linear_at_its_end(out, stride, expansion):
    block = unusual(InvertedResidual(4, out, stride, expansion))
    mid = 4 * expansion
    expand, depthwise, project = block.layers
    x = 20 * images(2, 4, 8, 8)
    y = relu(bn(expand.bn, conv2d(x, expand.conv.weight)))
    assert y.max() > 6, 'else it could be a ReLU6'
    y = conv2d(y, depthwise.conv.weight, stride=stride, padding=1, groups=mid)
    y = relu(bn(depthwise.bn, y))
    y = bn(project.bn, conv2d(y, project.conv.weight))
    agree(block(x), x + y if stride == 1 and out == 4 else y)


@torch.no_grad()
def test_vgg__is_convolution_norm_relu_and_three_poolings():
    model = unusual(build(VGG, depth=11))
    x = y = images(1, 3, 16, 16)
    for index, stage in enumerate(model.stages):
        for conv, norm in zip(stage[::3], stage[1::3], strict=True):
            y = relu(bn(norm, conv2d(y, conv.weight, conv.bias, padding=1)))
        if index < 3:
            y = max_pool2d(y, 2)
    agree(model(x)[0], y)


@torch.no_grad()
def test_mobilenet_v1__is_depthwise_then_pointwise():
    model = unusual(build('era_mm.MobileNetV1'))
    x = images(1, 3, 32, 32)
    stem = model.layers[0]
    y = conv2d(x, stem.conv.weight, stride=2, padding=1)
    y = relu(bn(stem.bn, y))
    for layer, (_, stride) in zip(model.layers[1:], model.LAYERS, strict=True):
        depthwise, pointwise = layer.depthwise_conv, layer.pointwise_conv
        y = conv2d(
            y,
            depthwise.conv.weight,
            stride=stride,
            padding=1,
            groups=y.shape[1],
        )
        y = relu(bn(depthwise.bn, y))
        y = relu(bn(pointwise.bn, conv2d(y, pointwise.conv.weight)))
    agree(model(x)[0], y)


@torch.no_grad()
def test_shufflenet_v2__begins_with_a_pointwise_convolution():
    model = unusual(build(SHUFFLE2))
    x = images(1, 3, 8, 8)
    stem = model.conv1
    y = relu(bn(stem.bn, conv2d(x, stem.conv.weight)))
    for layer in model.layers:
        y = layer(y)
    agree(model(x)[0], y)


def lepe_attention(part, q, k, v):
    """One window, place by place: ``(H, W, C)`` in and out."""
    rows, columns, channels = v.shape
    width = channels // part.num_heads
    out = torch.zeros_like(v)
    for head in range(part.num_heads):
        own = slice(head * width, (head + 1) * width)
        keys, values = k[..., own].flatten(0, 1), v[..., own].flatten(0, 1)
        for i in range(rows):
            for j in range(columns):
                scores = keys @ q[i, j, own] / width**0.5
                out[i, j, own] = scores.softmax(0) @ values
    local = conv2d(
        v.permute(2, 0, 1)[None],
        part.lepe.weight,
        part.lepe.bias,
        padding=1,
        groups=channels,
    )
    return out + local[0].permute(1, 2, 0)


@torch.no_grad()
@pytest.mark.parametrize('stripe', [2, 3, None])
def test_cswin__attends_in_columns_and_rows(stripe):
    """A map of 5 x 6: stripes of 2 and 3 leave rests, which see themselves."""
    attention = CrossShapedAttention(8, 4, stripe).double()
    x = images(2, 5, 6, 8)
    expected = torch.empty_like(x)
    for sample, out in zip(x, expected, strict=True):
        q, k, v = attention.qkv(sample).chunk(3, dim=-1)
        if stripe is None:
            out.copy_(lepe_attention(attention.parts[0], q, k, v))
            continue
        in_columns, in_rows = attention.parts
        for begin in range(0, 6, stripe):
            at = (slice(None), slice(begin, begin + stripe), slice(0, 4))
            out[at] = lepe_attention(in_columns, q[at], k[at], v[at])
        for begin in range(0, 5, stripe):
            at = (slice(begin, begin + stripe), slice(None), slice(4, 8))
            out[at] = lepe_attention(in_rows, q[at], k[at], v[at])
    agree(attention(x), attention.proj(expected))


@torch.no_grad()
def test_cswin__block_has_two_shortcuts():
    block = CSWinBlock(8, 4, 2, drop_path=0.5).double().eval()
    x = images(2, 4, 4, 8)
    y = x + block.attn(block.norm1(x))
    hidden = gelu(block.ffn.layers[0][0](block.norm2(y)))
    agree(block(x), y + block.ffn.layers[1](hidden))


@torch.no_grad()
def test_cswin__stages_have_the_published_widths_and_strides():
    arch = dict(embed_dims=8, depths=(1, 2, 3, 1), num_heads=(2, 2, 4, 8))
    model = build(
        'era_mm.CSWinTransformer',
        arch=arch,
        out_indices=(0, 1, 2, 3),
        drop_path_rate=0.6,
    )
    model.eval()
    found = [tuple(out.shape[1:]) for out in model(torch.zeros(1, 3, 64, 96))]
    assert found == [(8, 16, 24), (16, 8, 12), (32, 4, 6), (64, 2, 3)]
    stripes = [[b.attn.stripe for b in stage] for stage in model.stages]
    assert stripes == [[1], [2, 2], [7, 7, 7], [None]]
    # From 0 to 0.6 over seven blocks.
    rates = [b.drop_path.drop_prob for stage in model.stages for b in stage]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    with pytest.raises(ValueError, match=r"one of .*'tiny'.* got 'huge'"):
        build('era_mm.CSWinTransformer', arch='huge')


# -- initial weights --------------------------------------------------------


@pytest.mark.parametrize(
    ('kind', 'kwargs'),
    [
        (RESNET, dict(depth=20)),
        (WRN, dict(depth=16, width=2)),
        (VGG, dict(depth=8)),
        (MOBILE, {}),
        ('era_mm.MobileNetV1', {}),
    ],
)
def test_init__is_hes(kind, kwargs):
    model = build(kind, **kwargs)
    model.init_weights()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] ** 2
            weight = module.weight
            # 5 standard errors of an estimate from so many draws.
            slack = 5 / (2 * weight.numel()) ** 0.5
            scale = weight.std().item() * (fan_out / 2) ** 0.5
            assert scale == pytest.approx(1, abs=slack)
            assert module.bias is None or not module.bias.any()
        elif isinstance(module, nn.BatchNorm2d):
            # No block begins as the identity.
            assert (module.weight == 1).all()


@pytest.mark.parametrize('kind', [SHUFFLE1, SHUFFLE2])
def test_init__of_shufflenets_is_pytorchs(kind):
    model = build(kind)
    model.init_weights()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            # Uniform within 1 / sqrt(fan-in), which large layers all but
            # reach.
            bound = module.weight[0].numel() ** -0.5
            assert module.weight.abs().max() <= bound
            if module.weight.numel() > 1000:
                assert module.weight.abs().max() > 0.98 * bound


@pytest.mark.parametrize('kind', [WRN, SHUFFLE2])
def test_init__can_be_chosen(kind):
    kwargs = dict(depth=10) if kind == WRN else {}
    init = dict(type='Constant', layer='Conv2d', val=0.25)
    model = build(kind, init_cfg=init, **kwargs)
    model.init_weights()
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    plain = [m for m in convs if (m.weight == 0.25).all()]
    assert plain


# -- errors -------------------------------------------------------------------


@pytest.mark.parametrize(
    ('kind', 'kwargs', 'message'),
    [
        (RESNET, dict(depth=20, width=2), r'`width` must be one of \[1, 4\]'),
        (RESNET, dict(depth=21), '21'),
        (WRN, dict(depth=15), '`depth` must be 6n \\+ 4'),
        (WRN, dict(depth=4), '`depth` must be 6n \\+ 4'),
        (VGG, dict(depth=9), r'`depth` must be one of \[8, 11, 13, 16, 19\]'),
    ],
)
def test_errors__say_which_depths_and_widths_there_are(kind, kwargs, message):
    with pytest.raises((ValueError, KeyError), match=message):
        build(kind, **kwargs)
