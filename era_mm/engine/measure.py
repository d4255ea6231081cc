"""Measures the outputs of a host model by running it once."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from mmengine.config import ConfigDict
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor, nn

from era_mm.core.host_models import (
    KINDS,
    blank_sample,
    image_channels,
    is_query_based,
    kind_of,
    num_classes_of,
)
from era_mm.core.recorder import as_tuple
from era_mm.core.utils import evaluating, preserve_rng
from era_mm.errors import UserError

Feats = tuple[Tensor, ...]


class Seen(NamedTuple):
    """Outputs of modules in one forward pass, in the order in which they ran.

    Args:
        outputs: Tensors of all calls of a module; empty if its output cannot
            be distilled.
        calls: Number of calls of each.
    """

    outputs: dict[str, Feats]
    calls: dict[str, int]


@torch.no_grad()
def observe(
    model: nn.Module,
    names: Sequence[str],
    input_size: int,
    *,
    whole: bool = False,
    training: bool = False,
) -> Seen:
    """Run a model on a random image and record the outputs of some modules.

    Args:
        model: A host model.
        names: Dotted names of modules. Those that do not run are skipped.
        input_size: Side of the image, in pixels.
        whole: Run the heads as well; otherwise only up to the neck.
        training: Run it in training mode, on two images, because norms refuse
            a single value per channel. Its buffers do not change.
    """
    seen = Seen({}, {})
    modules = dict(model.named_modules())

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            try:
                feats = as_tuple(output, source=name)
            except ValueError:
                feats = ()
            # Last in the dict means last to run.
            before = seen.outputs.pop(name, ())
            seen.outputs[name] = before + feats
            seen.calls[name] = seen.calls.get(name, 0) + 1

        return modules[name].register_forward_hook(hook)

    with preserve_rng(), evaluating(model):
        torch.manual_seed(0)
        model.train(training)
        buffers = [(b, b.clone()) for b in model.buffers() if training]
        inputs = torch.randn(
            1 + training, image_channels(model), input_size, input_size
        )
        handles = [watch(name) for name in names]
        try:
            if whole:
                sample = blank_sample(input_size, input_size)
                model(inputs, [sample], mode='tensor')
            else:
                model.extract_feat(inputs)
        finally:
            for handle in handles:
                handle.remove()
            for buffer, value in buffers:
                buffer.copy_(value)
    return seen


@dataclass
class Member:
    """One model of a pair, as built from its config.

    Args:
        role: 'student' or 'teacher'.
        name: What messages call it: its reference.
        config: Its model config, data_preprocessor included.
        scope: Scope of its types; None: the current one.
        classes: Names of the classes it was trained for, if known.
    """

    role: str
    name: str
    config: ConfigDict
    scope: str | None = None
    classes: tuple[str, ...] | None = None
    model: nn.Module = field(init=False, repr=False)
    kind: str = field(init=False)
    feats: dict[str, Feats] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        try:
            with (
                preserve_rng(),
                DefaultScope.overwrite_default_scope(self.scope),
            ):
                self.model = MODELS.build(copy.deepcopy(self.config))
        # The constructors of the hosts' models may raise anything.
        except Exception as error:
            raise UserError(
                f'{self.role}: the model of {self.name} cannot be built: '
                f'{type(error).__name__}: {error}. Correct the config; '
                'tools/print_sources.py builds only this model.'
            ) from error
        # Not chained: the `train` of mmdet's LAD returns None.
        self.model.eval()
        self.kind = kind_of(self.model)
        if self.kind not in KINDS.values():
            raise UserError(
                f'{self.role}: expected a detector of mmdet or a classifier '
                f'of mmpretrain, but {self.name} is a {self.kind}. Give the '
                'config of the model that it contains or was trained for.'
            )
        if not hasattr(self.model, 'backbone'):
            raise UserError(
                f'{self.role}: {self.name} is a {type(self.model).__name__}'
                ', which has no module `backbone`: it wraps another model. '
                'Give the config of that one.'
            )

    @property
    def num_classes(self) -> int | None:
        """Number of its classes, if its head tells."""
        return num_classes_of(self.model)

    @property
    def channels(self) -> int:
        """How many channels its images have."""
        return image_channels(self.model)

    @property
    def feeds_head(self) -> str:
        """The module whose output is the input of its head."""
        neck = getattr(self.model, 'neck', None)
        return 'backbone' if neck is None else 'neck'

    def measure(self, input_size: int) -> None:
        """Run it once and keep the outputs of backbone, neck and encoder."""
        names = [
            name
            for name, _ in self.model.named_modules()
            if name in ('backbone', 'neck', 'encoder')
            or (name.startswith('backbone.') and name.count('.') <= 2)
        ]
        self.feats = observe(
            self.model, names, input_size, whole=is_query_based(self.model)
        ).outputs

    def outputs(self, dim: int, *, inner: bool = False) -> str | None:
        """The source whose outputs all have this number of dimensions.

        The neck is preferred to the backbone.

        Args:
            dim: Dimensions of each output: 4 for maps, 2 for vectors.
            inner: Whether to search the layers of the backbone as well, from
                the end: for the tokens of a transformer, and for a backbone
                that outputs more than tensors.
        """
        names = [self.feeds_head, 'backbone']
        if inner:
            names += [n for n in reversed(self.feats) if '.' in n]
        for name in names:
            feats = self.feats.get(name)
            if feats and all(feat.dim() == dim for feat in feats):
                return name
        return None

    def stages(self) -> list[str]:
        """The last sequence of blocks at each map size, largest map first.

        Those of the backbone; found by their outputs, not by name.
        """
        last: dict[int, str] = {}
        for name, feats in self.feats.items():
            if (
                name.startswith('backbone.')
                and [feat.dim() for feat in feats] == [4]
                and isinstance(self.model.get_submodule(name), nn.Sequential)
            ):
                last[feats[0].shape[2]] = name
        return [last[size] for size in sorted(last, reverse=True)]

    def extra_tokens(self, tokens: Tensor) -> int:
        """Number of tokens in ``(N, T, C)`` that have no position."""
        number = tokens.shape[1]
        known = getattr(self.model.backbone, 'num_extra_tokens', None)
        return number - math.isqrt(number) ** 2 if known is None else known
