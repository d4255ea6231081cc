"""The released branch of MBRNet."""

from mmengine.model import BaseModule
from torch import Tensor, nn

from .building import LAYERS, build_activation, build_norm


def projection(
    in_channels: int, out_channels: int, spatial_dims: int
) -> nn.Module:
    """A 1x1 convolution, or a linear layer for vectors."""
    if spatial_dims == 0:
        return nn.Linear(in_channels, out_channels)
    return LAYERS[spatial_dims](in_channels, out_channels, 1)


def _groups(channels: int, group_width: int | None) -> int:
    """The smallest number of groups within the width."""
    if group_width is None:
        return 1
    return next(
        groups
        for groups in range(1, channels + 1)
        if channels % groups == 0 and channels // groups <= group_width
    )


class ResidualBranch(BaseModule):
    """One residual approximator.

        hidden:  [layer - norm - act] x (num_blocks - 1), layer - norm
        forward: hidden, (projection)

    The layer is Linear (with bias) on vectors and a 3-wide convolution
    (without) on maps; the width is ``in_channels``; there is a projection
    only if the channels differ.

    Args:
        in_channels: C_s.
        out_channels: C_t.
        spatial_dims: 0 for ``(N, C)``, 1 for ``(N, C, L)``, 2 for
            ``(N, C, H, W)``.
        num_blocks: Blocks of the branch.
        num_norms: Norms per block: one for each level with its own
            statistics.
        norm_cfg: Norm.
        act_cfg: Activation; the last block has none.
        group_width: As in :class:`MBRNet`.

    Source: ERA [official code].
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        spatial_dims: int,
        num_blocks: int,
        num_norms: int,
        norm_cfg: dict,
        act_cfg: dict,
        group_width: int | None = None,
    ) -> None:
        super().__init__()
        if spatial_dims == 0:
            layers = [
                nn.Linear(in_channels, in_channels) for _ in range(num_blocks)
            ]
        else:
            groups = _groups(in_channels, group_width)
            layers = [
                LAYERS[spatial_dims](
                    in_channels,
                    in_channels,
                    3,
                    padding=1,
                    groups=groups,
                    bias=False,
                )
                for _ in range(num_blocks)
            ]
        self.layers = nn.ModuleList(layers)
        self.norms = nn.ModuleList(
            nn.ModuleList(
                build_norm(norm_cfg, in_channels, spatial_dims)
                for _ in range(num_norms)
            )
            for _ in range(num_blocks)
        )
        # One per block: some activations learn (PReLU).
        self.activations = nn.ModuleList(
            build_activation(act_cfg) for _ in range(num_blocks - 1)
        )
        self.projection = (
            projection(in_channels, out_channels, spatial_dims)
            if in_channels != out_channels
            else nn.Identity()
        )

    def init_weights(self) -> None:
        """As :func:`init_like_released`."""
        init_like_released(self)

    def hidden(self, x: Tensor, norm: int = 0) -> Tensor:
        """The residual before its projection, in the student's channels.

        Args:
            x: The student's feature, or another input by the topology.
            norm: Which of the norms to use.

        Shape:
            - x, out: ``(N, C_s, *)``
        """
        last = len(self.layers) - 1
        for index, layer in enumerate(self.layers):
            x = self.norms[index][norm](layer(x))
            if index < last:
                x = self.activations[index](x)
        return x

    def forward(self, x: Tensor, norm: int = 0) -> Tensor:
        """One residual.

        Shape:
            - x: ``(N, C_s, *)``
            - out: ``(N, C_t, *)``
        """
        return self.projection(self.hidden(x, norm))


def init_like_released(module: nn.Module) -> None:
    """Linear N(0, 0.01), convolutions Kaiming fan-out; norms keep 1 and 0.

    Source: [official code]. Not zero-initialised: the closing norm makes each
    residual unit-variance per channel at the first step.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, 0, 0.01)
            nn.init.zeros_(layer.bias)
        elif isinstance(layer, (nn.Conv1d, nn.Conv2d)):
            nn.init.kaiming_normal_(
                layer.weight, mode='fan_out', nonlinearity='relu'
            )
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
