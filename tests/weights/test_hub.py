"""Names on the Hub: local folders and cached copies are found offline, every refusal says what to do. Nothing is
downloaded here."""

import builtins
import os
import subprocess
import sys

import pytest

from egrpo_jax.common.errors import UserError
from egrpo_jax.weights.hub import resolve

huggingface_hub = pytest.importorskip("huggingface_hub")
errors = pytest.importorskip("huggingface_hub.errors")
REPO = "black-forest-labs/FLUX.1-dev"
BY_HAND = f"or run elsewhere: hf download {REPO} --local-dir FOLDER, and give FOLDER"


def http_error(kind, status=403):
    """An error as the client raises it, with the answer of the server."""
    response_type = errors.Response
    request = __import__(response_type.__module__.split(".")[0]).Request("GET", f"https://huggingface.co/api/{REPO}")
    return kind(f"{status} Client Error.\n\nCannot access {REPO}.", response=response_type(status, request=request))


def test_what_lies_here_is_taken_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    (tmp_path / "org" / "name").mkdir(parents=True)
    (tmp_path / "x.safetensors").touch()
    monkeypatch.chdir(tmp_path)
    assert resolve("org/name", []).samefile(tmp_path / "org" / "name")
    assert resolve(tmp_path / "x.safetensors", []) == tmp_path / "x.safetensors"


@pytest.mark.parametrize("name", ["/no/such/folder", "./here/there", "folder", "a/b/c", "a/b c", "../x"])
def test_paths_are_not_asked_of_the_hub(name, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    with pytest.raises(UserError, match="does not exist; give a file or folder that does, or org/name of a model"):
        resolve(name, [])


def test_only_the_files_needed_are_downloaded(tmp_path, monkeypatch):
    asked = []

    def download(repo, allow_patterns):
        asked.append((repo, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve(REPO, ("transformer/*",)) == tmp_path
    assert asked == [(REPO, ["transformer/*"])]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            http_error(errors.GatedRepoError),
            f"{REPO} is gated: accept its licence at https://huggingface.co/{REPO}, then run: hf auth login",
        ),
        (
            http_error(errors.RepositoryNotFoundError, 401),
            f"{REPO} is no local folder and no model on the Hub that you may see; correct the name, or, if it is "
            "private, run: hf auth login",
        ),
        (
            errors.LocalEntryNotFoundError("Cannot find an appropriate cached snapshot folder"),
            f"{REPO} is not in the cache, whole, and the Hub cannot be reached; go online, {BY_HAND}",
        ),
        (
            http_error(errors.HfHubHTTPError, 500),
            f"cannot download {REPO}: 500 Client Error.; try again, {BY_HAND}",
        ),
        (
            OSError(28, "No space left on device"),
            f"cannot download {REPO}: [Errno 28] No space left on device; try again, {BY_HAND}",
        ),
        (TimeoutError(), f"cannot download {REPO}: TimeoutError; try again, {BY_HAND}"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_each_refusal_says_what_to_do(error, message, monkeypatch):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(UserError) as caught:
        resolve(REPO, ["transformer/*"])
    assert str(caught.value) == message


def test_without_the_client(monkeypatch):
    genuine = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.startswith("huggingface_hub"):
            raise ImportError(name)
        return genuine(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UserError) as caught:
        resolve(REPO, [])
    expected = f"{REPO} is no local folder; to download it: pip install 'egrpo_jax[hub]', {BY_HAND}"
    assert str(caught.value) == expected


def resolve_offline(cache):
    """The genuine client in a process that may not use the network."""
    code = f"from egrpo_jax.weights.hub import resolve; print(resolve({REPO!r}, ['transformer/*']))"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache)}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


def test_offline_a_cached_copy_is_found_and_an_absent_one_told(tmp_path):
    assert f"UserError: {REPO} is not in the cache, whole, and the Hub" in resolve_offline(tmp_path).stderr
    repo = tmp_path / "models--black-forest-labs--FLUX.1-dev"
    folder = repo / "snapshots" / ("0" * 40) / "transformer"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    assert resolve_offline(tmp_path).stdout.strip() == str(folder.parent)
