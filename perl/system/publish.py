"""Uploading an exported folder to the model hub."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from perl.errors import UserError
from perl.report.numbers import bytes_text
from perl.system.progress import console


def check_repository(repository: str) -> None:
    """Refuse an invalid repository name before anything is exported.

    Raises:
        UserError: it is not a valid name on the hub.
    """
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(str(error), where="--push-to-hub", remedy="Write USER/NAME or NAME.") from None


def push_to_hub(folder: Path, repository: str, why_offline: str) -> None:
    """Upload a folder to a repository, which is created as private if it does not exist.

    Args:
        folder: all its files are uploaded.
        why_offline: why the hub cannot be reached, in which case files are only listed; empty: it can.

    Raises:
        UserError: the hub refused the upload. The folder is kept.
    """
    if why_offline:
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        sizes = "\n".join(f"  {file.relative_to(folder)}  {bytes_text(file.stat().st_size)}" for file in files)
        console.print(
            f"Nothing was uploaded to {repository}: {why_offline}. The files are:\n{sizes}\n"
            f"With a connection, run: hf upload {repository} {folder}",
            markup=False,
        )
        return
    api = HfApi()
    try:
        repository = api.create_repo(repository, private=True, exist_ok=True).repo_id
        commit = api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload by perl-rlhf")
    except HfHubHTTPError as error:
        raise UserError(
            f"the hub refused {repository}: {error.server_message or error}",
            where="--push-to-hub",
            remedy=f"Log in with hf auth login and a token with write access. The export is in {folder}.",
        ) from None
    console.print(f"Uploaded: {commit.commit_url} (a new repository is private).", markup=False)
