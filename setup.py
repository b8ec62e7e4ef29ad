"""Build entry point; the metadata lives in pyproject.toml. Compiled ops of csrc/ will be declared here."""

from setuptools import setup

setup()
