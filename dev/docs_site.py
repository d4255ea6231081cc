"""Hooks of mkdocs: pages that do not lie in docs/, and the pages of the API.

Links in all pages are those that lead to files of the repository. Here they
are turned into links to the page that a file becomes, or to the repository.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
#: Pages made of files outside of docs/.
OUTSIDE = {
    'index.md': 'README.md',
    'contributing.md': 'CONTRIBUTING.md',
    'changelog.md': 'CHANGELOG.md',
}
LINK = re.compile(r'(?<=\]\()(?!\w+:|#)([^)#\s]+)(#[^)\s]*)?(?=\))')
ROLE = re.compile(r':\w+:`~?([\w.]+)`')


def pages_of_the_api() -> dict[str, str]:
    """A page for each subpackage and for the modules beside them."""
    pages = {}
    package = ROOT / 'era_mm'
    for folder in [package, *sorted(p for p in package.rglob('*'))]:
        modules = sorted(folder.glob('*.py')) if folder.is_dir() else []
        names = [
            '.'.join(path.relative_to(ROOT).with_suffix('').parts)
            for path in modules
            if path.stem not in ('__init__', '__main__')
        ]
        if names:
            name = '.'.join(folder.relative_to(ROOT).parts)
            parts = [f'# {name}', *(f'::: {module}' for module in names)]
            pages[f'api/{name}.md'] = '\n\n'.join(parts) + '\n'
    return pages


def config_pages() -> dict[str, str]:
    """The config folders' pages: name in the site, file."""
    return {
        f'configs/{path.parent.name}.md': path.relative_to(ROOT).as_posix()
        for path in sorted(ROOT.glob('configs/*/README.md'))
    }


def on_config(config: Any) -> Any:
    """Add the generated pages to the menu."""
    config.nav += [
        {'Configs': list(config_pages())},
        {'API': [{Path(p).stem: p} for p in pages_of_the_api()]},
    ]
    return config


def on_files(files: Files, *, config: Any) -> Files:
    """Add the generated pages."""
    found = {
        page: (ROOT / path).read_text()
        for page, path in (OUTSIDE | config_pages()).items()
    }
    for page, text in (found | pages_of_the_api()).items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(
    markdown: str, *, page: Any, config: Any, files: Files
) -> str:
    """Turn links to files of the repository into links of the site."""
    outside = OUTSIDE | config_pages()
    here = page.file.src_uri
    source = outside.get(here, f'docs/{here}')
    page_of = {path: name for name, path in outside.items()}
    page_of |= {f'docs/{file.src_uri}': file.src_uri for file in files}

    def target(found: re.Match) -> str:
        path = posixpath.normpath(
            posixpath.join(posixpath.dirname(source), found[1])
        )
        anchor = found[2] or ''
        if path in page_of:
            return (
                os.path.relpath(page_of[path], posixpath.dirname(here) or '.')
                + anchor
            )
        if not (ROOT / path).exists():
            # mkdocs names it.
            return found[0]
        return f'{config.repo_url}/blob/main/{path}{anchor}'

    return LINK.sub(target, markdown)


class SphinxRoles(griffe.Extension):
    """Shows ``:func:`name``` as the code that it names."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Change the docstring of one object."""
        if obj.docstring:
            obj.docstring.value = ROLE.sub(r'`\1`', obj.docstring.value)
