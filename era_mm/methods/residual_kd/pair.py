"""The pair that is deployed: student, assistant, and the sum of both.

``ResidualPair`` replaces the backbone (and neck) of a host model, so the pair
is an ordinary host model: its config builds it, its checkpoint loads into it,
and tools that count parameters or FLOPs count those of the pair.

Legend: N batch, C channels, L levels, * none or two spatial dimensions; P the
student's feature before the adapter, F_S after it, F_A the assistant's.
"""

from collections.abc import Mapping, Sequence

from mmcv.cnn import ConvModule, build_norm_layer
from mmengine.model import BaseModule, ModuleList, Sequential
from mmengine.registry import MODELS as MMENGINE_MODELS
from torch import Tensor, nn

from ...core.utils import preserve_rng
from ...layers import spare_lone_values
from ...registry import MODELS

Feats = tuple[Tensor, ...]
_NORM = dict(type='BN')


def _as_maps(module: nn.Module, feat: Tensor) -> Tensor:
    """Run a module for maps on maps or on vectors, as maps of one pixel."""
    if feat.dim() == 2:
        return module(feat[..., None, None]).flatten(1)
    return module(feat)


def _zero(layer: nn.Module) -> None:
    """Make a layer output exactly 0: by its norm's scale, if it has one."""
    if isinstance(layer, ConvModule):
        layer = layer.norm if layer.with_norm else layer.conv
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


class FeatureExtractor(BaseModule):
    """A backbone, and a neck if there is one.

    Args:
        backbone: Host config.
        neck: Host config, or None.
    """

    def __init__(self, backbone: dict, neck: dict | None = None) -> None:
        super().__init__()
        self.backbone = MMENGINE_MODELS.build(backbone)
        self.neck = None if neck is None else MMENGINE_MODELS.build(neck)

    def forward(self, inputs: Tensor) -> Feats:
        """Features of a batch.

        Shape:
            - inputs: ``(N, 3, H, W)``
            - out: L of ``(N, C, *)``
        """
        feats = self.backbone(inputs)
        if self.neck is not None:
            feats = self.neck(feats)
        return (feats,) if isinstance(feats, Tensor) else tuple(feats)


class ResidualAdapter(BaseModule):
    """1x1 convolution and norm per level.

    Where channels agree it is the identity, or the norm alone if it starts
    at 0.

    Source: ours.

    Args:
        in_channels: One per level.
        out_channels: Likewise.
        norm_cfg: Norm; None: only a convolution with bias. BN is
            [inference].
        zero_init: Start by outputting 0.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: Sequence[int],
        norm_cfg: dict | None = _NORM,
        zero_init: bool = False,
    ) -> None:
        super().__init__()
        self.zero_init = zero_init
        self.levels = ModuleList()
        for before, after in zip(in_channels, out_channels, strict=True):
            if before == after and not zero_init:
                self.levels.append(nn.Identity())
            elif before == after and norm_cfg is not None:
                self.levels.append(build_norm_layer(norm_cfg, after)[1])
            else:
                self.levels.append(
                    ConvModule(
                        before, after, 1, norm_cfg=norm_cfg, act_cfg=None
                    )
                )
        self._start_at_zero()

    def _start_at_zero(self) -> None:
        for level in self.levels if self.zero_init else ():
            _zero(level)

    def init_weights(self) -> None:
        """As mmcv's layers, then the zero start."""
        super().init_weights()
        self._start_at_zero()

    def forward(self, feats: Sequence[Tensor]) -> Feats:
        """Features in the channels of the given model.

        Shape:
            - feats: L of ``(N, C_in, *)``
            - out: L of ``(N, C_out, *)``
        """
        return tuple(
            _as_maps(level, feat)
            for level, feat in zip(self.levels, feats, strict=True)
        )


@MODELS.register_module()
class ImageAssistant(BaseModule):
    """A narrow network of its own on the image.

        F_A = adapter(neck(backbone(image)))

    Source: Residual KD [paper: assistant and student are derived from one
    given model]; hence it takes the image [inference].

    Args:
        backbone: Host config.
        neck: Host config, or None.
        in_channels: Channels of its features, one per level.
        out_channels: Channels of the pair's features, likewise.
        norm_cfg: Norm of the adapter.
        zero_init_last: Start with F_A = 0, so that training begins at the
            student alone [inference].
    """

    def __init__(
        self,
        backbone: dict,
        in_channels: Sequence[int],
        out_channels: Sequence[int],
        neck: dict | None = None,
        norm_cfg: dict | None = _NORM,
        zero_init_last: bool = True,
    ) -> None:
        super().__init__()
        self.extractor = FeatureExtractor(backbone, neck)
        self.adapter = ResidualAdapter(
            in_channels,
            out_channels,
            norm_cfg=norm_cfg,
            zero_init=zero_init_last,
        )

    def forward(self, inputs: Tensor, feats: Sequence[Tensor]) -> Feats:
        """The residual F_A.

        Args:
            inputs: The images.
            feats: The student's features; not used.

        Shape:
            - inputs: ``(N, 3, H, W)``
            - out: L of ``(N, C, *)``
        """
        return self.adapter(self.extractor(inputs))


@MODELS.register_module()
class FeatureAssistant(BaseModule):
    """A stack of convolutions on the student's features.

        F_A = [conv - norm - act] x (num_convs - 1), conv - norm (P)

    and a 1x1 convolution where P has other channels than the pair. The
    student's feature is detached, so the assistant never trains the student.

    Source: ours; the form nearest to a branch of ERA (arXiv 2508.16050). The
    paper's assistant takes the image.

    Args:
        in_channels: Channels of P, one per level.
        out_channels: Channels of the pair's features, likewise.
        num_convs: Convolutions per level, 3x3 on maps and 1x1 on vectors. 2
            is ERA's.
        mid_channels: Width between them. None: that of P.
        spatial_dims: 2 for maps, 0 for vectors.
        norm_cfg: Norm.
        act_cfg: Activation; none after the last.
        zero_init_last: As in ``ImageAssistant``.

    Raises:
        ValueError: ``num_convs`` below 1.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: Sequence[int],
        num_convs: int = 2,
        mid_channels: int | None = None,
        spatial_dims: int = 2,
        norm_cfg: dict | None = _NORM,
        act_cfg: dict = dict(type='ReLU'),  # noqa: B006
        zero_init_last: bool = True,
    ) -> None:
        super().__init__()
        if num_convs < 1:
            raise ValueError(
                f'`num_convs` must be at least 1, but got {num_convs}.'
            )
        self.zero_init_last = zero_init_last
        size = 3 if spatial_dims else 1
        self.levels = ModuleList()
        for first, last in zip(in_channels, out_channels, strict=True):
            middle = mid_channels or first
            # Back to P's width, as ERA's branch, before the projection.
            widths = [first, *[middle] * (num_convs - 1), first]
            convs: list[nn.Module] = [
                ConvModule(
                    widths[i],
                    widths[i + 1],
                    size,
                    padding=size // 2,
                    norm_cfg=norm_cfg,
                    act_cfg=act_cfg if i < num_convs - 1 else None,
                )
                for i in range(num_convs)
            ]
            if first != last:
                convs.append(ConvModule(first, last, 1, act_cfg=None))
            self.levels.append(Sequential(*convs))
        self._start_at_zero()

    def _start_at_zero(self) -> None:
        for level in self.levels if self.zero_init_last else ():
            _zero(level[-1])

    def init_weights(self) -> None:
        """As mmcv's layers, then the zero start."""
        super().init_weights()
        self._start_at_zero()

    def forward(self, inputs: Tensor, feats: Sequence[Tensor]) -> Feats:
        """The residual F_A.

        Args:
            inputs: The images; not used.
            feats: The student's features P.

        Shape:
            - feats: L of ``(N, C_P, *)``
            - out: L of ``(N, C, *)``
        """
        return tuple(
            _as_maps(level, feat.detach())
            for level, feat in zip(self.levels, feats, strict=True)
        )


@MODELS.register_module()
class ResidualPair(BaseModule):
    """Student and assistant in place of a backbone.

        F_S = adapter(student(image)),   F_int = F_S + F_A

    The head sees F_int, in training and afterwards.

    Source: Residual KD, arXiv 2002.09168. That the assistant stays at
    inference and its output is added back is [inference]: without it the
    paper's condition on the cost of both would mean nothing.

    Note:
        The student's keys begin with ``backbone.student``: optimisers that
        decay the learning rate by layer do not find them.

    Args:
        student: Host configs of its ``backbone`` and, optionally, ``neck``.
        assistant: Config of an ``ImageAssistant`` or ``FeatureAssistant``.
        in_channels: Channels of the student's features P, one per level.
        out_channels: Channels of the pair's features, likewise.
        norm_cfg: Norm of the student's adapter.
        init_cfg: As in mmengine.
    """

    def __init__(
        self,
        student: Mapping,
        assistant: dict,
        in_channels: Sequence[int],
        out_channels: Sequence[int],
        norm_cfg: dict | None = _NORM,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg)
        self.student = FeatureExtractor(**student)
        # Modules after the student must see the same random state as in a
        # plain model, so that the pair starts from the plain model's weights.
        with preserve_rng():
            self.adapter = ResidualAdapter(in_channels, out_channels, norm_cfg)
            self.assistant = MMENGINE_MODELS.build(assistant)
        # As the extras of other methods: the last batch of an epoch may have
        # only one image.
        for module in (self.adapter, self.assistant):
            spare_lone_values(module)

    def init_weights(self) -> None:
        """Initialise the student as in a plain model, then the rest."""
        self.student.init_weights()
        with preserve_rng():
            self.adapter.init_weights()
            self.assistant.init_weights()
        self.is_init = True

    def forward(self, inputs: Tensor) -> Feats:
        """The features that the head sees.

        Shape:
            - inputs: ``(N, 3, H, W)``
            - out: L of ``(N, C, *)``
        """
        feats = self.student(inputs)
        residuals = self.assistant(inputs, feats)
        return tuple(
            feat + residual
            for feat, residual in zip(
                self.adapter(feats), residuals, strict=True
            )
        )
