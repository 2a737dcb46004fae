"""Uploads a checkpoint to the hub: checks it first, then sends it file by file, and publishes it in one commit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from shiftadd_cli.artifact.folder import Artifact
from shiftadd_cli.artifact.verify import verify
from shiftadd_cli.errors import HubError, first_line

_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


@dataclass(frozen=True)
class Push:
    """A checked upload; nothing has been sent yet.

    Attributes:
        folder: the checkpoint; files: paths to upload, relative to it, with sizes in bytes.
        repo: `NAME`, owned by the logged-in user, or `OWNER/NAME`.
        revision: branch, created if it does not exist; None for the main one.
        private: whether a new repository is private. An existing one stays as it is.
    """

    folder: Path
    repo: str
    revision: str | None
    private: bool
    files: dict[str, int]

    @classmethod
    def prepare(cls, folder: Path, repo: str, *, revision: str | None = None, private: bool = True) -> Push:
        """Check the name, and that the checkpoint in `folder` is complete and undamaged, which reads all of it.

        Raises HubError, and ArtifactError if the folder is no checkpoint or a damaged one.
        """
        try:
            validate_repo_id(repo)
        except HFValidationError as failure:
            raise HubError(f"{repo!r} cannot be the name of a repository ({first_line(failure)}).") from failure
        verify(Artifact.open(folder))
        files = {
            str(path.relative_to(folder)): path.stat().st_size
            for path in sorted(folder.rglob("*"))
            if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        }
        return cls(folder, repo, revision, private, files)

    @property
    def nbytes(self) -> int:
        return sum(self.files.values())

    def run(self, message: str) -> str:
        """Create the repository if it does not exist and upload in one commit; returns the URL of the commit.

        Files that the hub already has are not sent again, so that an interrupted upload resumes.

        Raises HubError if the hub refuses or cannot be reached.
        """
        api = HfApi(token=require_token())
        with _refusals(self.repo):
            repo = api.create_repo(self.repo, private=self.private, exist_ok=True).repo_id
            if self.revision is not None:
                api.create_branch(repo, branch=self.revision, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo,
                folder_path=self.folder,
                revision=self.revision,
                commit_message=message,
                allow_patterns=list(self.files),
            )
        return str(commit.commit_url)


def require_token() -> str:
    """The token of the user's login or of HF_TOKEN. Raises HubError if there is none."""
    token = get_token()
    if token is None:
        raise HubError(f"Uploading needs a hub token; {_LOG_IN}.")
    return token


@contextmanager
def _refusals(repo: str) -> Iterator[None]:
    try:
        yield
    except HfHubHTTPError as failure:
        code = failure.response.status_code
        if code == 401:
            raise HubError(f"The hub does not accept the token; {_LOG_IN}.") from failure
        if code == 403:
            raise HubError(f"The token may not write to {repo}; {_LOG_IN}, with a token that may.") from failure
        raise HubError(f"The hub refuses the upload to {repo} ({first_line(failure)}); try again later.") from failure
    except Exception as failure:  # the library passes on whatever its transport raises
        raise HubError(
            f"The upload to {repo} was interrupted ({first_line(failure)}); the same command resumes it."
        ) from failure
