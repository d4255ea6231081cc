"""Images that cannot be read are named."""

from collections.abc import Iterator
from typing import Any

from mmcv.transforms import LoadImageFromFile

from era_mm.errors import UserError, first_line


class NamesItsFile:
    """A transform that reads an image, and says which one it cannot read.

    The hosts' raises what the decoder says, often without a name. Everything
    else of the transform is as it is.

    Args:
        transform: The hosts'.

    Raises:
        UserError: When called, if the image cannot be read.
    """

    def __init__(self, transform: LoadImageFromFile) -> None:
        self.transform = transform

    def __getattr__(self, name: str) -> Any:
        if name == 'transform' or name.startswith('__'):
            # Not set yet: pickle asks before it fills the object.
            raise AttributeError(name)
        return getattr(self.transform, name)

    def __repr__(self) -> str:
        return repr(self.transform)

    def __call__(self, results: dict) -> dict | None:
        try:
            return self.transform(results)
        except Exception as error:
            name = results.get('img_path', 'an image without a path')
            raise UserError(
                f'{name}: cannot be read as an image '
                f'({type(error).__name__}: {first_line(error)}). Replace the '
                'file, or take it out of the annotations.'
            ) from error


def name_image_files(dataset: Any) -> None:
    """Let a dataset's pipelines name the images that they cannot read.

    Args:
        dataset: Of mmengine, or what wraps some. Changed in place; once is
            enough, and again does no harm.
    """
    for pipeline in _pipelines_in(dataset):
        transforms = getattr(pipeline, 'transforms', None)
        if not isinstance(transforms, list):
            continue
        for index, transform in enumerate(transforms):
            if isinstance(transform, LoadImageFromFile):
                transforms[index] = NamesItsFile(transform)


def _pipelines_in(dataset: Any) -> Iterator[Any]:
    # Those that wrap one call it `dataset`, those that join some `datasets`.
    yield getattr(dataset, 'pipeline', None)
    inside = getattr(dataset, 'dataset', None)
    more = getattr(dataset, 'datasets', None) or ()
    for part in (inside, *more):
        if part is not None:
            yield from _pipelines_in(part)
