"""setuptools' build backend, which also asks for nvcc's wheels where a GPU's driver is found and no
nvcc: `pip install` then builds the CUDA half of the extension on a machine that has no toolkit."""

import toolchain
from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403


def get_requires_for_build_wheel(config_settings=None):
    return build_meta.get_requires_for_build_wheel(config_settings) + toolchain.nvcc_wheels()


def get_requires_for_build_editable(config_settings=None):
    return build_meta.get_requires_for_build_editable(config_settings) + toolchain.nvcc_wheels()
