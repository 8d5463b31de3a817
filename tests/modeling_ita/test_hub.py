"""A saved checkpoint is complete: code, card, handler and image processor, on disk and when pushed to the Hub."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, ModelCardData
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, pipeline
from transformers.dynamic_module_utils import get_imports
from transformers.utils import hub

from helpers.tiny_checkpoint import save_tiny_checkpoint

ROOT = Path(__file__).parents[2]
BESIDE_CODE = {
    "README.md",
    "config.json",
    "model.safetensors",
    "preprocessor_config.json",
    "requirements.txt",
}
STRANGERS_PACKAGES = {
    "numpy",
    "torch",
    "torchvision",
    "transformers",
    "open_clip",
    "PIL",
    "huggingface_hub",
    "yaml",
}
STRANGERS_PACKAGES |= {"timm", "safetensors", "triton"}  # installed with those


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = save_tiny_checkpoint(tmp_path_factory.mktemp("hub") / "tiny")
    (folder / "examples").mkdir()
    Image.new("RGB", (40, 30), "red").save(folder / "examples" / "red.png")
    return folder


@pytest.fixture(scope="module")
def model(checkpoint):
    return AutoModel.from_pretrained(checkpoint).eval()


def code_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.py")}


def run_elsewhere(script: str, *arguments: Path, folder: Path):
    """The last line that a script prints, in a process whose packages are installed but not this one."""
    (folder / "script.py").write_text(script)
    environment = {
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(folder / "modules"),
        "OMP_NUM_THREADS": "1",
        "PATH": os.environ["PATH"],
    }
    command = [sys.executable, "-P", str(folder / "script.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_folder_has_all_that_it_needs_and_nothing_else(checkpoint):
    names = {path.name for path in checkpoint.iterdir()} - {"examples"}
    assert names - set(code_of(checkpoint)) == BESIDE_CODE
    assert code_of(checkpoint).keys() >= {
        "modeling_ita.py",
        "handler.py",
        "pipeline_ita.py",
        "checkpoint_code.py",
    }
    for line in (checkpoint / "requirements.txt").read_text().split():
        assert line.partition(">=")[0] in ("transformers", "open_clip_torch", "timm", "pillow")


def test_its_code_is_this_code_and_imports_nothing_that_a_stranger_lacks(checkpoint):
    for name, content in code_of(checkpoint).items():
        assert content == (ROOT / "modeling_ita" / name).read_bytes()
        foreign = set(get_imports(checkpoint / name)) - set(sys.stdlib_module_names)
        assert foreign <= STRANGERS_PACKAGES, name


def test_the_toolkits_repository_holds_no_copy_of_the_code():
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("not a clone")
    listed = subprocess.run(
        ["git", "ls-files", "models"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert listed.stdout and not [line for line in listed.stdout.split() if line.endswith(".py")]


def test_saved_again_the_folder_brings_image_processor_and_examples_along(checkpoint, model, tmp_path):
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved == json.loads((checkpoint / "preprocessor_config.json").read_text())
    assert (tmp_path / "examples/red.png").read_bytes() == (checkpoint / "examples/red.png").read_bytes()
    assert ModelCard.load(tmp_path / "README.md").data.widget[0]["src"] == "examples/red.png"


def test_an_image_processor_that_is_there_stays(model, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text("{}")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "preprocessor_config.json").read_text() == "{}"


def test_a_checkpoint_without_code_works_where_the_package_is_and_is_complete_when_saved(
    checkpoint, tmp_path
):
    """As `models/ita-tiny` in a clone of the repository."""
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(checkpoint / "model.safetensors", bare)
    for name in ("config.json", "preprocessor_config.json"):
        content = json.loads((checkpoint / name).read_text())
        kept = {key: value for key, value in content.items() if key not in ("auto_map", "custom_pipelines")}
        (bare / name).write_text(json.dumps(kept))
    image = Image.new("RGB", (40, 30), "red")
    segment = pipeline("zero-shot-image-segmentation", model=str(bare))
    assert isinstance(segment(image, candidate_labels=["cat", "dog"]), list)
    AutoModel.from_pretrained(bare).save_pretrained(tmp_path / "saved")
    assert code_of(tmp_path / "saved") == code_of(checkpoint)
    for name in ("config.json", "preprocessor_config.json"):
        saved, expected = (
            json.loads((folder / name).read_text()) for folder in (tmp_path / "saved", checkpoint)
        )
        assert saved["auto_map"] == expected["auto_map"]
    assert AutoImageProcessor.from_pretrained(tmp_path / "saved").size.shortest_edge == 64


class FakeHub:
    """Takes what is pushed, and has a card already where `card` is given."""

    def __init__(self, monkeypatch, card: str | None = None):
        self.files: dict[str, bytes] = {}
        monkeypatch.setattr(hub, "hf_api", lambda: self)
        monkeypatch.setattr(hub.PushToHubMixin, "_upload_modified_files", self.take)
        form = ModelCard.from_template(
            ModelCardData(library_name="transformers"), model_description="It was automatically generated."
        )
        found = form if card is None else ModelCard(card)
        monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *args, **options: found)

    def create_repo(self, repo_id, **kwargs):
        return type("Repo", (), {"repo_id": repo_id})

    def take(self, working_dir, repo_id, *args, **kwargs):
        self.files = {path.name: path.read_bytes() for path in Path(working_dir).iterdir() if path.is_file()}


def test_a_push_takes_code_and_card_along(checkpoint, model, monkeypatch):
    pushed = FakeHub(monkeypatch)
    model.push_to_hub("someone/segmenter")
    assert set(pushed.files) >= BESIDE_CODE | set(code_of(checkpoint))
    card = pushed.files["README.md"].decode()
    assert 'model="someone/segmenter"' in card
    assert "More Information Needed" not in card
    assert ModelCard(card).data.pipeline_tag == "image-segmentation"


def test_a_push_keeps_the_card_that_a_person_wrote_on_the_hub(model, monkeypatch):
    pushed = FakeHub(monkeypatch, "---\nlicense: mit\n---\n\n# Mine\n\nMy text.\n")
    model.push_to_hub("someone/segmenter")
    card = ModelCard(pushed.files["README.md"].decode())
    assert card.text == "\n# Mine\n\nMy text.\n"
    assert (card.data.license, card.data.library_name) == ("mit", "transformers")


LOAD_TWICE = """
import json, sys, torch
from transformers import AutoImageProcessor, AutoModel
pixels = torch.linspace(-1, 1, 3 * 64 * 64).view(1, 3, 64, 64)
models = [AutoModel.from_pretrained(one, trust_remote_code=True).eval() for one in sys.argv[1:] * 2]
processors = [AutoImageProcessor.from_pretrained(one, trust_remote_code=True) for one in sys.argv[1:] * 2]
with torch.no_grad():
    sums = [model(pixels).class_queries_logits.sum().item() for model in models]
print(json.dumps([sums, [sys.modules[type(one).__module__].VERSION for one in processors]]))
"""


def test_folders_with_different_code_keep_their_own_behavior_in_one_process(checkpoint, tmp_path):
    folders = [tmp_path / "one" / "model", tmp_path / "two" / "model", tmp_path / "other"]
    for version, folder in zip((1, 2, 4), folders, strict=True):
        shutil.copytree(checkpoint, folder)
        for name, addition in (
            ("image_processing_ita.py", f"VERSION = {version}\n"),
            (
                "modeling_ita.py",
                "_forward = ITAForOpenVocabSegmentation.forward\n"
                "def forward(self, *args, **options):\n"
                "    output = _forward(self, *args, **options)\n"
                f"    output.class_queries_logits = {version} * output.class_queries_logits\n"
                "    return output\n"
                "ITAForOpenVocabSegmentation.forward = forward\n",
            ),
        ):
            with (folder / name).open("a") as file:
                file.write(addition)
    sums, versions = run_elsewhere(LOAD_TWICE, *folders, folder=tmp_path)
    assert sums == [sums[0], 2 * sums[0], 4 * sums[0]] * 2
    assert versions == [1, 2, 4] * 2
