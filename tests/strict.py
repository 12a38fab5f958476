"""Patches that can't be in vain.

A test that replaces `module.name` proves nothing if the program looks the name up elsewhere. So a
name of ours may only be replaced where the code of that module uses it, and a function that
replaces another must have been called in the end."""
import ast
import functools
import inspect
import pkgutil
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def may_stay_unused(function):
    """For a replacement that the program need not reach, or must not."""
    function.may_stay_unused = True
    return function


@may_stay_unused
def must_not_be_called(*_, **__):
    raise AssertionError("called")


@functools.cache
def names_used(path) -> set[str]:
    """The names that a file's code reads: `name` as it is, and `anything.name`."""
    nodes = list(ast.walk(ast.parse(Path(path).read_text())))
    names = {node.id for node in nodes
             if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    return names | {node.attr for node in nodes if isinstance(node, ast.Attribute)}


def is_ours(module) -> bool:
    path = Path(getattr(module, "__file__", None) or "/")
    return ROOT in path.parents and ".venv" not in path.parts


def is_looked_up(module, name) -> bool:
    """Whether some code reads this name in this module: its own, or `module.name` in another."""
    if name in names_used(module.__file__):
        return True
    for other in list(sys.modules.values()):
        if is_ours(other) and "tests" not in Path(other.__file__).parts:
            aliases = [key for key, value in vars(other).items() if value is module]
            source = Path(other.__file__).read_text()
            if any(f"{alias}.{name}" in source for alias in aliases):
                return True
    return False


class StrictPatch(pytest.MonkeyPatch):
    """A MonkeyPatch that refuses a patch in vain."""

    def __init__(self):
        super().__init__()
        self.uncalled = {}      # number of the patch -> what was patched

    def setattr(self, target, name, *rest, **kwargs):
        # pytest also takes ("module.name", value) in place of (module, "name", value).
        if isinstance(target, str):
            place, _, own = target.rpartition(".")
            target, name, rest = pkgutil.resolve_name(place), own, (name, *rest)
        value, *rest = rest
        if isinstance(target, types.ModuleType) and is_ours(target):
            assert is_looked_up(target, name), f"{target.__name__}.{name} is looked up elsewhere"
        if inspect.isfunction(value) and not hasattr(value, "may_stay_unused"):
            value = self.counted(value, f"{getattr(target, '__name__', target)}.{name}")
        super().setattr(target, name, value, *rest, **kwargs)

    def counted(self, function, what):
        number = len(self.uncalled)
        self.uncalled[number] = what

        @functools.wraps(function)
        def call(*args, **kwargs):
            self.uncalled[number] = None
            return function(*args, **kwargs)
        return call

    def check(self):
        """After the test: was every replaced function called?"""
        in_vain = [what for what in self.uncalled.values() if what]
        assert not in_vain, f"patched in vain, never called: {', '.join(in_vain)}"
