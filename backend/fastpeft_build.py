"""Build backend: setuptools', plus torch as a build requirement only where no torch is installed.

A plain `torch` in [build-system] requires would fetch several GB into every isolated build, even
beside an installed torch whose headers serve as well.
"""

from fastpeft_torch import find_torch
from setuptools import build_meta as _base
from setuptools.build_meta import *  # noqa: F403  (the hooks that need no change)


def _torch_requirement() -> list[str]:
    return [] if find_torch() else ["torch>=2.11"]


def get_requires_for_build_wheel(config_settings=None):
    return _base.get_requires_for_build_wheel(config_settings) + _torch_requirement()


def get_requires_for_build_editable(config_settings=None):
    return _base.get_requires_for_build_editable(config_settings) + _torch_requirement()
