"""The align layers folded into a neck."""

import copy

import pytest
import torch
from mmdet.models.necks import FPN
from torch import nn

from era_mm.errors import UserError
from era_mm.methods.era.export import fold_into_neck


@pytest.mark.parametrize(
    'settings',
    [
        dict(num_outs=3),
        dict(num_outs=2, start_level=1),
        dict(num_outs=2, end_level=1),
        dict(num_outs=4, add_extra_convs='on_input'),
        dict(num_outs=3, start_level=1, add_extra_convs='on_lateral'),
        # Nothing is left to compute: True alone adds no convolution.
        dict(num_outs=3, add_extra_convs=True),
        dict(num_outs=3, norm_cfg=dict(type='SyncBN')),
        dict(num_outs=3, norm_cfg=dict(type='BN'), no_norm_on_lateral=True),
    ],
    ids=str,
)
def test_fold__of_any_fpn_is_the_align_layer_behind_it(settings):
    neck, aligns = FPN([4, 6, 8], 5, **settings), nn.ModuleList()
    inputs = [
        torch.randn(2, c, 24 // s, 16 // s)
        for c, s in zip((4, 6, 8), (1, 2, 4), strict=True)
    ]
    neck.init_weights()
    aligns.extend(nn.Conv2d(5, 5, 1) for _ in range(settings['num_outs']))
    for module in neck.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in module.state_dict().values():
                if tensor.is_floating_point():
                    tensor.uniform_(0.5, 1.5)
    neck.double().eval()
    aligns.double()
    wanted = [
        u(p)
        for u, p in zip(
            aligns, neck([i.double() for i in inputs]), strict=True
        )
    ]
    before = copy.deepcopy(neck.state_dict())
    state = fold_into_neck(neck, aligns)
    for key, value in neck.state_dict().items():
        assert torch.equal(value, before[key]), 'the student was changed'
    neck.load_state_dict(state)
    found = list(neck([i.double() for i in inputs]))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_fold__subsampled_levels_need_the_same_align_layer():
    neck = FPN([4, 6], 5, num_outs=4)
    neck.init_weights()
    aligns = [nn.Conv2d(5, 5, 1) for _ in range(4)]
    for level in (2, 3):
        aligns[level].load_state_dict(aligns[1].state_dict())
    inputs = (torch.randn(2, 4, 16, 12), torch.randn(2, 6, 8, 6))
    wanted = [u(p) for u, p in zip(aligns, neck(inputs), strict=True)]
    folded = copy.deepcopy(neck)
    folded.load_state_dict(fold_into_neck(neck, aligns))
    torch.testing.assert_close(list(folded(inputs)), wanted)
    for name in ('weight', 'bias'):
        other = copy.deepcopy(aligns)
        getattr(other[3], name).data.view(-1)[0] += 1
        with pytest.raises(UserError, match='level 3 is level 2 subsampled'):
            fold_into_neck(neck, other)


def test_fold__by_hand():
    # One channel: W = 3 at the centre, then a norm with gamma 2, beta 5,
    # mean 1 and var + eps = 4, so P = 2 * (3 x - 1) / 2 + 5 = 3 x + 4; and
    # u = 10 P + 7 = 30 x + 47.
    neck = FPN([1], 1, num_outs=1, norm_cfg=dict(type='BN')).eval()
    module, align = neck.fpn_convs[0], nn.Conv2d(1, 1, 1)
    with torch.no_grad():
        module.conv.weight.zero_()[..., 1, 1] = 3
        module.bn.weight.fill_(2)
        module.bn.bias.fill_(5)
        module.bn.running_mean.fill_(1)
        module.bn.running_var.fill_(4 - module.bn.eps)
        align.weight.fill_(10)
        align.bias.fill_(7)
    state = fold_into_neck(neck, [align])
    weight = state['fpn_convs.0.conv.weight'].flatten()
    torch.testing.assert_close(weight[4], torch.tensor(30.0))
    assert weight.count_nonzero() == 1
    norm = {k.split('.')[-1]: v for k, v in state.items() if 'convs.0.bn' in k}
    assert norm['bias'].item() == pytest.approx(47)
    assert (norm['weight'].item(), norm['running_mean'].item()) == (1, 0)
    assert norm['running_var'].item() == pytest.approx(1 - module.bn.eps)
