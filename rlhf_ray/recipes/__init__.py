"""Config files that come with the package: `recipe:NAME` on the command line and in the Python API.

An installed wheel has them in `files/` in this folder; a checkout keeps them in `configs/`.
"""

from __future__ import annotations

from pathlib import Path

from rlhf_ray.errors import InputError

PREFIX = "recipe:"
_HERE = Path(__file__).parent
_FOLDERS = (_HERE / "files", _HERE.parents[1] / "configs")


class UnknownRecipe(InputError, LookupError):
    """There is no recipe of this name."""


def names() -> list[str]:
    """The names of all recipes, sorted."""
    return sorted({path.stem for folder in _FOLDERS for path in folder.glob("*.yaml")})


def find(name: str) -> Path:
    """The config file of a recipe.

    Args:
        name: the file's name without `.yaml`.

    Raises:
        UnknownRecipe: listing the recipes that exist.
    """
    for folder in _FOLDERS:
        if name in {path.stem for path in folder.glob("*.yaml")}:
            return folder / f"{name}.yaml"
    raise UnknownRecipe(
        f"there is no recipe {name!r}; choose one of {', '.join(names()) or 'none (none is installed)'}"
    )
