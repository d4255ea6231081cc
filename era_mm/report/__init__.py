"""A page that shows what distillations did, from their work dirs.

In reading order: ``runs`` (work dirs read), ``comparison`` (runs sorted into
teacher, plain and distilled), ``figures`` and ``residual_figures`` (curves and
bars), ``models``, ``heat``, ``panel_parts``, ``pictures`` and ``panels``
(images, where weights and data are at hand), ``parts`` and ``page`` (all of
it as one text), ``command``.
"""

from .command import write_demo_report, write_report

__all__ = ['write_demo_report', 'write_report']
