"""The teacher: built, strictly loaded, frozen, and not part of the model."""

import contextlib
import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from mmengine.config import ConfigDict
from mmengine.model import BaseModule
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor, nn

from ..errors import said_of
from ..registry import explain_unknown_keys
from .checkpoint import fingerprint, load_whole, read_with_meta
from .host_models import (
    forget_files,
    forward_until,
    images_for,
    resolve_model_config,
)
from .recorder import Recorder
from .utils import errors_only, preserve_rng


def classes_of(meta: Mapping | Sequence) -> tuple[str, ...] | None:
    """The class names in the meta data of a file or a data set.

    Files of mmengine have the data set's meta data (``dataset_meta``), older
    ones only the names (``CLASSES``). Several data sets in one have a list
    where they differ (mmdet's ``ConcatDataset``); None if the names differ.
    """
    if isinstance(meta, Mapping):
        meta = meta.get('dataset_meta') or meta
    if not isinstance(meta, Mapping):
        each = {classes_of(part) for part in meta}
        return each.pop() if len(each) == 1 else None
    names = meta.get('classes') or meta.get('CLASSES')
    if names is None:
        return None
    return (names,) if isinstance(names, str) else tuple(map(str, names))


#: Instead of a checkpoint: a teacher with initial weights.
RANDOM = 'random'


class BaseTeacher:
    """A model whose features the student learns from.

    Not an ``nn.Module`` on purpose: so it is not in ``parameters()``,
    ``state_dict()``, optimiser groups, DDP buckets and EMA of the model that
    holds it, and no ``train()`` reaches it. ``StudentModel`` applies every
    ``_apply`` (``to``, ``cuda``, ``half``, ...) to it as well. ``deepcopy``
    shares it.

    Args:
        model: The model.
        config: Its config.
        name: Its name, for messages.
    """

    def __init__(
        self, model: nn.Module, config: ConfigDict, name: str
    ) -> None:
        self.model = model
        self.config = config
        self.name = name
        #: Hash of the weights as they were loaded; None: not loaded, or they
        #: change.
        self.loaded_fingerprint: str | None = None
        #: Weights of the teacher from a checkpoint of the student.
        self.brought: dict[str, Tensor] = {}
        self._recorder: Recorder | None = None

    def __deepcopy__(self, memo: dict) -> 'BaseTeacher':
        return self

    @property
    def is_loaded(self) -> bool:
        """Whether the weights are loaded."""
        return True

    def load(self) -> None:
        """Load the weights, unless they are loaded."""

    def take(self, weights: Mapping[str, Tensor]) -> None:
        """Take weights from a student's checkpoint."""
        self.brought |= weights

    def apply_(self, fn: Any) -> None:
        """Follow an ``nn.Module._apply`` of the model that holds it."""

    def fingerprint(self) -> str:
        """Hash of all weights and buffers as they are now."""
        return fingerprint(self.model.state_dict())

    def record(self, sources: Iterable[str]) -> None:
        """Set the features that :meth:`extract` returns."""
        self._recorder = Recorder(self.model, sources, owner=self.name)

    @property
    def is_recorded(self) -> bool:
        """Whether any of its features is recorded."""
        return self._recorder is not None and bool(self._recorder.sources)

    @torch.no_grad()
    def extract(
        self, inputs: Tensor, data_samples: list | None = None
    ) -> dict[str, tuple[Tensor, ...]]:
        """Features of a batch, without gradient.

        Args:
            inputs: The batch from the teacher's own preprocessor.
            data_samples: Ground truth, for models that need it.

        Shape:
            - inputs: ``(N, 3, H, W)``
            - each feature: ``(N, C, H', W')`` or ``(N, C)``
        """
        assert self._recorder is not None
        # no_grad and not inference_mode: inference tensors cannot take part
        # in the student's backward pass.
        with self._recorder as recorder:
            forward_until(self.model, inputs, recorder.sources, data_samples)
        return recorder.pop()


@explain_unknown_keys
class Teacher(BaseTeacher):
    """A frozen model from a config, with every tensor from a checkpoint.

    Args:
        config: As for :func:`resolve_model_config`.
        checkpoint: Path or URL of its weights, or a list of them that are
            tried in order; or 'random', for initial weights as in training,
            without the files that its ``init_cfg`` names (for trials only: a
            random teacher teaches noise).
        sha256: The first digits of the file's SHA-256. None: not checked.
        dtype: 'float16' or 'bfloat16' runs its forward under autocast; the
            features are returned as float32. None: as the surrounding
            context.
        name: Its name, for messages.
        same_classes: That its class i is class i of the data, whatever both
            are called. False: only where the names say so, or are not known;
            else its head does not judge.

    Raises:
        TypeError: An unknown key.
        ValueError: No checkpoint, an unknown ``dtype``, or an invalid
            ``sha256``.
    """

    DTYPES = {'float16': torch.float16, 'bfloat16': torch.bfloat16}

    def __init__(
        self,
        config: str | Mapping,
        checkpoint: str | Sequence[str] | None = None,
        # Not `str | None`: the check below tells to quote the digits.
        sha256: Any = None,
        dtype: str | None = None,
        name: str = 'teacher',
        same_classes: bool = False,
    ) -> None:
        if checkpoint is None:
            raise ValueError(
                f'The {name} has no `checkpoint`. Give the path or URL of '
                "its weights (or 'random' for a trial without weights)."
            )
        if dtype is not None and dtype not in self.DTYPES:
            raise ValueError(
                f'`dtype` of the {name} must be one of '
                f'{sorted(self.DTYPES)} or None, but got {dtype!r}.'
            )
        if sha256 is not None and not (
            isinstance(sha256, str) and re.fullmatch('[0-9a-fA-F]+', sha256)
        ):
            raise ValueError(
                f'`sha256` of the {name} must be the first digits of a '
                f'SHA-256 as a string (in quotes), but got {sha256!r}.'
            )
        self.checkpoint = checkpoint
        self.sha256 = sha256
        self.dtype = dtype
        self.same_classes = same_classes
        found, scope = resolve_model_config(config)
        with preserve_rng(), DefaultScope.overwrite_default_scope(scope):
            # Detectors write into the config that they are built from.
            with said_of(f'The {name} cannot be built', 'Correct its config.'):
                model = MODELS.build(copy.deepcopy(found))
            super().__init__(model, found, name)
            if self.is_random:
                self._start_at_random()
        self.model.requires_grad_(False)
        self.model.eval()
        #: Names of its classes, if its file has them.
        self.classes: tuple[str, ...] | None = None

    @property
    def is_random(self) -> bool:
        """Whether its weights are random, from no checkpoint."""
        return self.checkpoint == RANDOM

    @property
    def is_loaded(self) -> bool:
        """Whether the weights are loaded."""
        return self.loaded_fingerprint is not None

    def load(self) -> None:
        """Load the weights, once.

        Not done in ``__init__``: a test run of the student needs no teacher
        weights and must not download them.
        """
        if self.is_loaded:
            return
        if not self.is_random:
            state_dict, meta = read_with_meta(self.checkpoint, self.sha256)
            load_whole(self.model, state_dict, name=str(self.checkpoint))
            self.classes = classes_of(meta)
        self._check_brought()
        self.loaded_fingerprint = self.fingerprint()

    def _start_at_random(self) -> None:
        # Some parameters are uninitialised memory until `init_weights`
        # (`level_embed` of Deformable DETR), which may hold NaN.
        forget_files(self.model)
        if isinstance(self.model, BaseModule):
            with errors_only():
                self.model.init_weights()

    def take(self, weights: Mapping[str, Tensor]) -> None:
        """Take weights from a student's checkpoint.

        A checkpoint may hold the head that the extras were trained with. A
        'random' teacher takes its weights, so that predictions through the
        head need no file of the teacher. A teacher with its own checkpoint
        must have the same weights.

        Raises:
            ValueError: This teacher does not have such weights, or its own
                differ; raised as soon as the teacher is loaded.
        """
        super().take(weights)
        if self.is_loaded:
            self._check_brought()
            self.loaded_fingerprint = self.fingerprint()

    @torch.no_grad()
    def _check_brought(self) -> None:
        own = self.model.state_dict()
        for key, value in self.brought.items():
            if key not in own or own[key].shape != value.shape:
                found = tuple(own[key].shape) if key in own else 'nothing'
                raise ValueError(
                    f'The checkpoint has {key!r} {tuple(value.shape)} of '
                    f'the {self.name} it was trained with, but the '
                    f'{self.name} has {found} there. Give the config of the '
                    f'{self.name} it was trained with.'
                )
            value = value.to(own[key])
            if self.is_random:
                own[key].copy_(value)
            elif not torch.equal(own[key], value):
                raise ValueError(
                    f'The checkpoint was trained with another {self.name}: '
                    f'{key!r} differs from that in {self.checkpoint!r}. Give '
                    "the file it was trained with, or checkpoint='random' to "
                    'predict with the weights in the checkpoint.'
                )

    def extract(
        self, inputs: Tensor, data_samples: list | None = None
    ) -> dict[str, tuple[Tensor, ...]]:
        """Features of a batch, without gradient; float32 for a ``dtype``."""
        with self._autocast(inputs):
            feats = super().extract(inputs, data_samples)
        if self.dtype is None:
            return feats
        return {
            source: tuple(feat.float() for feat in maps)
            for source, maps in feats.items()
        }

    @torch.no_grad()
    def predict(self, batch: Any) -> list:
        """Its own predictions of a raw batch.

        In full precision: mmcv's box operators support no other on a CPU.

        Args:
            batch: What a dataloader gives.

        Returns:
            A data sample with predictions for each image.
        """
        images = images_for(self.model, batch['inputs'])
        return self.model.test_step({**batch, 'inputs': images})

    def _autocast(self, inputs: Tensor) -> Any:
        if self.dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(
            inputs.device.type, dtype=self.DTYPES[self.dtype]
        )

    def apply_(self, fn: Any) -> None:
        """Follow an ``nn.Module._apply`` of the model that holds it."""
        self.model._apply(fn)
        preprocessor = getattr(self.model, 'data_preprocessor', None)
        parameter = next(self.model.parameters(), None)
        if preprocessor is not None and parameter is not None:
            # Preprocessors store their device in addition to their buffers.
            preprocessor.to(parameter.device)
