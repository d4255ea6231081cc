"""The defaults of each form of ERA."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from .mbrnet import MBRNet


class Settings(NamedTuple):
    """A form's settings, including those of the config.

    Args:
        form: 'released' or 'normalised'.
        mbrnet: Arguments of ``MBRNet``.
        loss: Arguments of ``ERALoss``.
        twi_steps: The estimates that the teacher's head judges.
        twi_targets: The targets that it compares with.
    """

    form: str
    mbrnet: dict[str, Any]
    loss: dict[str, Any]
    twi_steps: str
    twi_targets: str


#: The released numbers are the [official code]'s, as ``MBRNet`` and
#: ``ERALoss`` have them; the others were chosen on val [ours].
FORMS = dict(
    released=Settings(
        form='released',
        mbrnet=dict(),
        loss=dict(),
        twi_steps='all',
        twi_targets='labels',
    ),
    normalised=Settings(
        form='normalised',
        mbrnet=dict(branch='bottleneck', normalize=True),
        loss=dict(
            align_weight=1.0,
            residual_weight=4.0,
            scales=1.0,
            twi_scales=(1.0, 1.0),
        ),
        twi_steps='sampled',
        twi_targets='teacher',
    ),
)


def settings_of(
    form: str,
    *,
    is_map: bool,
    mbrnet: Mapping[str, Any],
    loss: Mapping[str, Any],
) -> Settings:
    """The settings of a pair.

    Source: ours.

    Args:
        form: A key of ``FORMS``, or 'auto': by the features.
        is_map: Features are maps or sequences, no vectors.
        mbrnet: Arguments that the config gives.
        loss: The same of the loss.
    """
    if form == 'auto':
        form = 'normalised' if is_map else 'released'
    defaults = FORMS[form]
    net = dict(defaults.mbrnet)
    if 'branch' not in mbrnet and (
        not is_map or MBRNet.RELEASED_ONLY & set(mbrnet)
    ):
        # Its options are of the released branches.
        net |= dict(branch='released')
    net |= mbrnet
    if form == 'normalised' and net['branch'] == 'released':
        net.setdefault('zero_init', True)
    terms = dict(defaults.loss)
    if 'twi_on_aligned' in loss:
        # It says the same in the released way.
        terms.pop('twi_scales', None)
    return defaults._replace(mbrnet=net, loss=terms | dict(loss))
