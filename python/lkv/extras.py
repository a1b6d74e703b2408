"""Packages that are not needed until they are: what is missing is named, with the extra that brings it."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType


class MissingPackage(ImportError):
    """A package of an optional extra is not installed."""


def need(module: str, extra: str, what: str) -> ModuleType:
    """
    Args:
        module: to import. extra: of this project, which has it. what: for the message.

    Raises:
        MissingPackage: where the module, or something that it needs, is not installed.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise MissingPackage(
            f"lkv: expected the package {error.name!r} for {what}, got none; pip install 'lkv-ext[{extra}]'"
        ) from error
