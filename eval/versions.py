"""Versions of installed libraries, which scores and verdicts depend on."""

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version

__all__ = ["installed", "releases"]


def installed(name: str) -> str | None:
    """The version of a package; None where it is not installed, as when this one is run from a checkout."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def releases(names: Iterable[str]) -> dict[str, str | None]:
    """Major and minor version of each package, "2.14": what may change results on purpose, and not what mends a fault."""
    versions = {name: installed(name) for name in names}
    return {name: None if found is None else ".".join(found.split(".")[:2]) for name, found in versions.items()}
