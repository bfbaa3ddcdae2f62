"""The finished student is uploaded, and nothing else of the run; by the token of the environment alone."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest

from pocl.recipe import load_recipe

from ..conftest import pocl

WORDS = ["--hub", "me/tiny"]


class Hub:
    """In place of the hub's client: notes what it is asked for."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(self, **options: Any) -> "Hub":
        assert options == {}, "no token but that of the environment"
        return self

    def create_repo(self, name: str, **options: Any) -> Any:
        self.calls.append({"name": name, **options})
        return SimpleNamespace(repo_id=name, __str__=lambda self: name)

    def upload_folder(self, *, folder_path: str, **options: Any) -> Any:
        files = sorted(path.name for path in Path(folder_path).rglob("*"))
        self.calls.append({"files": files, "folder": folder_path, **options})
        return SimpleNamespace(oid="abc")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", made)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    return made


def test_a_finished_run_uploads_its_student_alone(copied_run: Path, hub: Hub) -> None:
    result = pocl("distill", copied_run, *WORDS, "--change")
    assert result.exit_code == 0, result.output
    made, uploaded = hub.calls
    assert made == {"name": "me/tiny", "private": True, "exist_ok": True}
    assert uploaded["files"] == sorted(path.name for path in (copied_run / "student").iterdir())
    assert {"README.md", "model.safetensors", "tokenizer.json"} <= set(uploaded["files"])
    assert uploaded["folder"] == str(copied_run / "student")
    assert json.loads((copied_run / "upload.json").read_text())["commit"] == "abc"
    assert "README.md" in result.output
    texts = [path.read_text() for path in copied_run.rglob("*.yaml")] + [(copied_run / "manifest.json").read_text()]
    assert not any("hf_secret" in text for text in [result.output, *texts])
    assert pocl("distill", copied_run, *WORDS).exit_code == 0
    assert len(hub.calls) == 2  # done is done


@pytest.mark.parametrize("dry", [True, False])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--hub", "me/tiny"], "there is no token to write there: set HF_TOKEN"),
        (["--hub", "me/my student"], "'me/my student' cannot be the name of one"),
        (["--hub.repository", "a/b/c"], "cannot be the name of one"),
    ],
)
def test_an_upload_that_could_not_work_is_refused_at_the_start(
    recipe: Path, tmp_path: Path, words: list[str], message: str, dry: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    result = pocl("distill", recipe, *words, *(["--dry-run"] if dry else []))
    assert result.exit_code == 2
    assert message in " ".join((result.output + result.stderr).split())
    assert not (tmp_path / "run" / "data").exists()


def test_an_adapter_of_a_folder_is_not_uploaded(tiny_model_folder: Path, hub: Hub) -> None:
    from pocl.pipeline.hub import check_hub
    from pocl.recipe import build_recipe

    def check(student: dict[str, Any]) -> None:
        check_hub(build_recipe({"student": student, "hub": "me/tiny"}))

    with pytest.raises(ValueError, match="which nobody else has; set student.lora.merge to true"):
        check({"model": str(tiny_model_folder), "lora": {}})
    check({"model": str(tiny_model_folder), "lora": {"merge": True}})
    check({"model": "org/base", "lora": {}})
    check({"model": str(tiny_model_folder)})


def test_no_key_of_a_recipe_takes_a_token(recipe: Path, tmp_path: Path) -> None:
    result = pocl("distill", recipe, "--training.extra", "{hub_token: hf_secret}")
    assert result.exit_code == 2
    assert "the token comes from HF_TOKEN" in result.stderr
    assert load_recipe(recipe).hub.repository is None
