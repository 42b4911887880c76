"""A user's own flow model or reward, which a config names as `module:attribute`."""

from __future__ import annotations

import importlib
from typing import Any

from egrpo_jax.common.errors import UserError


def load_attribute(path: str, what: str) -> Any:
    """The attribute that `path`, "module:attribute", names; `what` says in the error what it was wanted for.

    Raises:
      UserError: there is no such module or attribute, or the module raises an exception.
    """
    module, separator, attribute = path.partition(":")
    if not separator:
        raise UserError(f"{what} {path!r}: expected module:attribute")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{what} {path!r}: {error}") from error
    except Exception as error:  # the module is a user's, and does anything when it is imported
        raise UserError(f"{what} {path!r}: {type(error).__name__}: {error}") from error
