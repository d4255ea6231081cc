"""No module of the package imports itself by way of others."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
#: What rooms of the core may import of the package; of the core without its
#: name.
ROOMS = {
    'host_models': set(),
    'guards': set(),
    'plan': set(),
    'utils': set(),
    'recorder': set(),
    'connections': {'layers', 'registry'},
    'teacher': {
        *('checkpoint', 'host_models', 'recorder', 'utils'),
        *('errors', 'registry'),
    },
    'student_model': {
        *('base_distiller', 'checkpoint', 'fit', 'teacher'),
        'layers',
    },
    'build': {
        *('base_distiller', 'host_models', 'teacher', 'utils'),
        'errors',
    },
    'wiring': {
        *('base_distiller', 'connections', 'dry_run', 'host_models'),
        *('recorder', 'teacher', 'utils'),
    },
}


def modules():
    """The package's files by module."""
    found = {}
    for file in (ROOT / 'era_mm').rglob('*.py'):
        parts = file.relative_to(ROOT).with_suffix('').parts
        found['.'.join(parts).removesuffix('.__init__')] = file
    return found


def imports_of(module, files):
    """Modules of the package that a module names, in functions as well."""
    file = files[module]
    package = module.split('.')
    if file.name != '__init__.py':
        package = package[:-1]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1]
            base = '.'.join(
                [*(start if node.level else []), *filter(None, [node.module])]
            )
            # `from package import module`, or a name of the package's own.
            inner = [f'{base}.{alias.name}' for alias in node.names]
            names = [name if name in files else base for name in inner]
        else:
            continue
        yield from (name for name in names if name in files)


def circles_of(graph):
    """Sets of nodes that reach one another."""
    reached = {}
    for node in graph:
        seen, todo = set(), [node]
        while todo:
            for other in graph[todo.pop()] - seen:
                seen.add(other)
                todo.append(other)
        reached[node] = seen
    circles = []
    for node, others in reached.items():
        circle = {other for other in others if node in reached[other]}
        if circle and circle not in circles:
            circles.append(circle)
    return circles


def test_circles__are_found():
    graph = dict(a={'b'}, b={'c'}, c={'a', 'd'}, d={'e'}, e=set(), f={'f'})
    assert circles_of(graph) == [{'a', 'b', 'c'}, {'f'}]


def test_imports__have_no_circle():
    files = modules()
    graph = {name: set(imports_of(name, files)) for name in files}
    assert 'era_mm.core.step' in graph['era_mm.core.distillation']
    assert circles_of(graph) == []


@pytest.mark.parametrize('room', ROOMS)
def test_imports__of_a_room_are_what_it_may_know(room):
    found = {
        name.removeprefix('era_mm.').removeprefix('core.')
        for name in imports_of(f'era_mm.core.{room}', modules())
    }
    assert found <= ROOMS[room]


def test_imports__methods_need_no_engine():
    files = modules()
    for name in files:
        if name.startswith('era_mm.methods'):
            for other in imports_of(name, files):
                assert not other.startswith('era_mm.engine'), name
