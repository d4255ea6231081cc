"""Chooses the loss term that fits a teacher's head."""

from typing import Any

from .dense_term import DenseTerm
from .detector_term import DetectorTerm
from .logit import LogitTerm
from .roi_term import RoITerm
from .twi_heads import DenseTWIHead, TWIHead
from .two_stage import TwoStageTWIHead


def kind_for(head: TWIHead) -> str:
    """The default kind of term for a head."""
    if isinstance(head, DenseTWIHead):
        return 'dense'
    return 'roi' if isinstance(head, TwoStageTWIHead) else 'kl'


def term_for(
    head: TWIHead, kind: str | None = None, **settings: Any
) -> LogitTerm | DetectorTerm:
    """The term that compares the student's own head with the teacher's.

    Args:
        head: The teacher's head.
        kind: 'dense', 'roi', or one of ``LogitTerm.KINDS``. None: the
            default for this head.
        settings: Arguments of the term.

    Raises:
        ValueError: The kind is for other heads.
    """
    own = kind_for(head)
    kind = own if kind is None else kind
    term: LogitTerm | DetectorTerm
    if kind == 'dense':
        term = DenseTerm(**settings)
    elif kind == 'roi':
        term = RoITerm(**settings)
    else:
        term = LogitTerm(kind=kind, **settings)
    if kind != own and not (own == 'kl' and kind in LogitTerm.KINDS):
        raise ValueError(
            f'`logit` of kind {kind!r} does not fit the teacher, whose '
            f'head is a {type(head.head).__name__}. Remove `kind`, or set '
            f'kind={own!r}.'
        )
    return term
