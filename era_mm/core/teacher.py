"""The teacher: built, loaded strictly, frozen, and kept out of the model."""

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
from .host_models import forget_files, forward_until, resolve_model_config
from .recorder import Recorder
from .utils import errors_only, preserve_rng


def classes_of(meta: Mapping) -> tuple[str, ...] | None:
    """The class names that a file's or a data set's meta data tell.

    Files of mmengine keep the data set's meta data (``dataset_meta``), files
    from before it the names alone (``CLASSES``).
    """
    meta = meta.get('dataset_meta') or meta
    names = meta.get('classes') or meta.get('CLASSES')
    if names is None:
        return None
    return (names,) if isinstance(names, str) else tuple(map(str, names))


#: In place of a checkpoint: a teacher that starts as a training would.
RANDOM = 'random'


class BaseTeacher:
    """A model beside the trained one, whose features are learnt from.

    Not an ``nn.Module`` on purpose: so it is absent from ``parameters()``,
    ``state_dict()``, optimiser groups, DDP buckets and EMA of the model that
    holds it, and no ``train()`` reaches it. ``StudentModel`` passes every
    ``_apply`` (``to``, ``cuda``, ``half``, ...) on to it. ``deepcopy`` shares
    it.

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
        #: Weights that a checkpoint of the student brought along.
        self.brought: dict[str, Tensor] = {}
        self._recorder: Recorder | None = None

    def __deepcopy__(self, memo: dict) -> 'BaseTeacher':
        return self

    @property
    def is_loaded(self) -> bool:
        """Whether the weights are in."""
        return True

    def load(self) -> None:
        """Take the weights in, if they are not yet."""

    def take(self, weights: Mapping[str, Tensor]) -> None:
        """Take in weights that a student's checkpoint brings along."""
        self.brought |= weights

    def apply_(self, fn: Any) -> None:
        """Follow an ``nn.Module._apply`` of the model that holds it."""

    def fingerprint(self) -> str:
        """Hash of all weights and buffers as they are now."""
        return fingerprint(self.model.state_dict())

    def record(self, sources: Iterable[str]) -> None:
        """Say which features :meth:`extract` returns."""
        self._recorder = Recorder(self.model, sources, owner=self.name)

    @property
    def is_recorded(self) -> bool:
        """Whether any of its features is asked for."""
        return self._recorder is not None and bool(self._recorder.sources)

    @torch.no_grad()
    def extract(
        self, inputs: Tensor, data_samples: list | None = None
    ) -> dict[str, tuple[Tensor, ...]]:
        """Features of a batch, without gradient.

        Args:
            inputs: The batch as the teacher's own preprocessor gives it.
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
    """A frozen model of a config, every tensor of it from a checkpoint.

    Args:
        config: What :func:`resolve_model_config` takes.
        checkpoint: Path or URL of its weights, or a list of places that are
            tried in order; or 'random' (for tests of the machinery: a random
            teacher teaches noise), which starts as a training would, without
            the files that its ``init_cfg`` names.
        sha256: The first digits of the file's SHA-256. None: not looked at.
        dtype: 'float16' or 'bfloat16' runs its forward under autocast; the
            features come back as float32. None: as the surrounding context.
        name: Its name, for messages.

    Raises:
        TypeError: An unknown key.
        ValueError: No checkpoint given, an unknown ``dtype``, or a ``sha256``
            that is none.
    """

    DTYPES = {'float16': torch.float16, 'bfloat16': torch.bfloat16}

    def __init__(
        self,
        config: str | Mapping,
        checkpoint: str | Sequence[str] | None = None,
        # Not `str | None`: the check below says how to quote digits.
        sha256: Any = None,
        dtype: str | None = None,
        name: str = 'teacher',
    ) -> None:
        if checkpoint is None:
            raise ValueError(
                f'The {name} has no `checkpoint`. Give the path or URL of '
                "its weights (or 'random' to try the machinery only)."
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
        self.loaded_fingerprint: str | None = None
        #: Names of its classes, where its file tells them.
        self.classes: tuple[str, ...] | None = None

    @property
    def is_random(self) -> bool:
        """Whether it has no checkpoint: its weights are random ones."""
        return self.checkpoint == RANDOM

    @property
    def is_loaded(self) -> bool:
        """Whether the weights are in."""
        return self.loaded_fingerprint is not None

    def load(self) -> None:
        """Take the weights in, once.

        Not done in ``__init__``: a test run of the student needs no teacher
        weights, so it must not fetch them.
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
        # Some hosts leave memory as they find it until `init_weights`
        # (`level_embed` of Deformable DETR), and NaN may lie there.
        forget_files(self.model)
        if isinstance(self.model, BaseModule):
            with errors_only():
                self.model.init_weights()

    def take(self, weights: Mapping[str, Tensor]) -> None:
        """Take in weights that a student's checkpoint brings along.

        Those of the head that its extras were trained with, where a file has
        them. A 'random' teacher gets them, so that predictions through the
        head need no file of the teacher; one with a checkpoint of its own
        must hold the same.

        Raises:
            ValueError: Weights that this teacher does not have, or that
                differ from its own; as soon as the teacher is loaded.
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
                    f'The checkpoint brings {key!r} {tuple(value.shape)} of '
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
                    'predict with what the checkpoint brings.'
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

        In full precision: box operators of mmcv have no other on a CPU.

        Args:
            batch: What a dataloader gives.

        Returns:
            A data sample with predictions for each image.
        """
        return self.model.test_step(batch)

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
            # Preprocessors keep their device beside their buffers.
            preprocessor.to(parameter.device)
