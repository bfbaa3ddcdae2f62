"""Uploading the finished student to the Hugging Face hub (`hub.repository`): its folder, nothing else of the run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pocl.run_folder import write_text

if TYPE_CHECKING:
    from pocl.pipeline.context import Context
    from pocl.recipe import Recipe

RECORD = "upload.json"


def check_hub(recipe: Recipe) -> None:
    """Refuses a repository that no upload could reach, before the run.

    Raises:
        ValueError: a name that is none, no token, or an adapter that nobody else could put on its base.
    """
    from huggingface_hub import get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    name = recipe.hub.repository
    if name is None:
        return
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"hub.repository: {name!r} cannot be the name of one: {error}") from None
    if not get_token():
        raise ValueError(
            f"hub.repository is {name}, and there is no token to write there: set HF_TOKEN in the environment, or log "
            "in with `hf auth login`; or leave hub out"
        )
    lora, base = recipe.student.lora, recipe.student.model
    if lora and not lora.merge and base and Path(base).expanduser().is_dir():
        raise ValueError(
            f"hub.repository: the student is an adapter of the model in the folder {base}, which nobody else has; set "
            "student.lora.merge to true, or name the base by its hub id"
        )


def upload_student(context: Context) -> Mapping[str, Any]:
    """Make the repository where it is missing, and upload the student's folder in one commit."""
    from huggingface_hub import HfApi

    section, folder = context.recipe.hub, context.path / "student"
    assert section.repository is not None
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    size = sum(file.stat().st_size for file in files)
    names = ", ".join(str(file.relative_to(folder)) for file in files)
    context.say(f"{len(files)} files, {size / 1e6:.1f} MB: {names}")
    api = HfApi()  # with the token of the environment
    made = api.create_repo(section.repository, private=section.private, exist_ok=True)
    commit = api.upload_folder(
        repo_id=made.repo_id, folder_path=str(folder), commit_message=f"{context.recipe.name}, distilled with pocl"
    )
    record = {"repository": made.repo_id, "url": str(made), "commit": getattr(commit, "oid", None)}
    write_text(context.path / RECORD, json.dumps(record, indent=2) + "\n")
    return {**record, "note": f"{made}"}
