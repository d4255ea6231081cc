"""Whether two models mean the same by their class numbers."""

import re
from collections.abc import Sequence


def plain_name(name: str) -> str:
    """Spelling aside: 'Traffic_light' is 'traffic light'."""
    return re.sub(r'[\W_]+', ' ', name).strip().lower()


def why_other_classes(
    student: Sequence[str] | None, teacher: Sequence[str] | None
) -> str | None:
    """Why what a teacher predicts is of other classes, if so.

    The one rule for all that uses a teacher's head: it may judge only where
    class i of the teacher has the name of class i of the student's data,
    spelling aside. Names that are not known are taken to agree.

    Source: ours.

    Args:
        student: Names of the classes of the student's data.
        teacher: Of the teacher's.
    """
    if student is None or teacher is None:
        return None
    if len(student) != len(teacher):
        return (
            f'the teacher knows {len(teacher)} classes and the data has '
            f'{len(student)}'
        )
    if list(map(plain_name, student)) == list(map(plain_name, teacher)):
        return None
    return (
        'student and teacher have the same number of classes, but other ones '
        'or another order'
    )
