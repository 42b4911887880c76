"""Models by their names on the Hugging Face Hub. Its client is optional: the extra `hub`."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from egrpo_jax.common.errors import UserError

_REPO = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def resolve(path_or_repo: str | os.PathLike[str], allow_patterns: Sequence[str]) -> Path:
    """A local file or folder as it is, or that of the model `org/name`, downloaded unless it is in the cache.

    Args:
      path_or_repo: what the user named.
      allow_patterns: the files needed, as wildcards such as "transformer/*"; others are not downloaded.

    Raises:
      UserError: neither there nor to be had from the Hub; says what to do.
    """
    path = Path(path_or_repo)
    if path.exists():
        return path
    repo = os.fspath(path_or_repo)
    if not _REPO.fullmatch(repo):
        raise UserError(f"{repo} does not exist; give a file or folder that does, or org/name of a model on the Hub")
    return _download(repo, allow_patterns)


def _download(repo: str, allow_patterns: Sequence[str]) -> Path:
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError:
        raise UserError(
            f"{repo} is no local folder; to download it: pip install 'egrpo_jax[hub]', {_by_hand(repo)}"
        ) from None
    try:
        return Path(huggingface_hub.snapshot_download(repo, allow_patterns=list(allow_patterns)))
    except errors.GatedRepoError:
        raise UserError(
            f"{repo} is gated: accept its licence at https://huggingface.co/{repo}, then run: hf auth login"
        ) from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"{repo} is no local folder and no model on the Hub that you may see; correct the name, or, "
            "if it is private, run: hf auth login"
        ) from None
    except errors.LocalEntryNotFoundError:
        raise UserError(
            f"{repo} is not in the cache, whole, and the Hub cannot be reached; go online, {_by_hand(repo)}"
        ) from None
    except Exception as error:  # the client's own, its HTTP library's and the system's have no common base
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"cannot download {repo}: {reason or type(error).__name__}; try again, {_by_hand(repo)}"
        ) from error


def _by_hand(repo: str) -> str:
    return f"or run elsewhere: hf download {repo} --local-dir FOLDER, and give FOLDER"
