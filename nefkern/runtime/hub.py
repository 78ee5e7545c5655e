"""Runs on the model hub: which texts name a repository, and its files on this machine."""

from __future__ import annotations

import re
from pathlib import Path

from nefkern.runtime.errors import UserError, first_line

SCHEME = "hf://"

#: What is taken from a repository, and the only things put there: no file that runs code.
KINDS = ("*.safetensors", "*.yaml")

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_repository(name: str) -> bool:
    """Whether a text is ``owner/name``."""
    return _REPOSITORY.fullmatch(name) is not None


def repository_of(run: str | Path) -> str | None:
    """``owner/name``, perhaps with ``@revision``, if that is what ``run`` names.

    A path object, a folder that exists and any other text are none.

    Raises:
        UserError: ``hf://`` and something else.
    """
    if isinstance(run, Path):
        return None
    name = run.removeprefix(SCHEME)
    if is_repository(name.partition("@")[0]) and (name != run or not Path(run).exists()):
        return name
    if name != run:
        raise UserError(f"{run}: expected {SCHEME}owner/name, or {SCHEME}owner/name@revision")
    return None


def run_folder(run: str | Path) -> Path:
    """A run's folder: itself, or the files of the repository that it names.

    Raises:
        UserError: the repository cannot be had.
    """
    repository = repository_of(run)
    return Path(run) if repository is None else downloaded(repository)


def downloaded(repository: str) -> Path:
    """The files of ``owner/name@revision`` on this machine, from the hub or its cache."""
    name, _, revision = repository.partition("@")
    hub = client()
    go_offline_without_network()
    try:
        return Path(hub.snapshot_download(name, revision=revision or None, allow_patterns=KINDS))
    except Exception as error:  # hub, network and cache errors come in dozens of classes
        raise UserError(
            f"{repository}: no such folder, and no such repository could be had from the model hub "
            f"({type(error).__name__}: {first_line(error)})"
        ) from error


def client():
    """The package huggingface_hub; a UserError where it is not installed."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError(
            f"the model hub: needs huggingface_hub ({error}); pip install huggingface_hub"
        ) from None
    return huggingface_hub


def go_offline_without_network() -> None:
    """Without a network: cached files or nothing, not a minute of the hub client's retries."""
    import socket
    import urllib.parse
    import urllib.request  # here: --help should not wait for it

    from huggingface_hub import constants

    hub = urllib.parse.urlsplit(constants.ENDPOINT)
    proxy = urllib.request.getproxies().get(hub.scheme)
    if proxy and not urllib.request.proxy_bypass(hub.hostname or ""):
        hub = urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    port = hub.port or (443 if hub.scheme == "https" else 80)
    try:
        socket.create_connection((hub.hostname, port), timeout=5).close()
    except OSError:
        constants.HF_HUB_OFFLINE = True
