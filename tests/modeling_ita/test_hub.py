"""A saved checkpoint is complete: code, card, handler and image processor, on disk and on the way to the Hub."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from PIL import Image
from transformers import AutoModel
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.utils import hub

import modeling_ita
from helpers.tiny_checkpoint import save_tiny_checkpoint
from modeling_ita.checkpoint_code import CODE_FILES, collect_code

BESIDE_CODE = {
    "README.md",
    "config.json",
    "model.safetensors",
    "preprocessor_config.json",
    "requirements.txt",
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = save_tiny_checkpoint(tmp_path_factory.mktemp("hub") / "tiny")
    (folder / "examples").mkdir()
    Image.new("RGB", (40, 30), "red").save(folder / "examples" / "red.png")
    return folder


@pytest.fixture(scope="module")
def model(checkpoint):
    return AutoModel.from_pretrained(checkpoint).eval()


def test_a_folder_has_all_that_it_needs_and_nothing_else(checkpoint):
    found = {path.name for path in checkpoint.iterdir()} - {"examples"}
    assert found == BESIDE_CODE | set(CODE_FILES)
    assert not [path for path in checkpoint.iterdir() if path.name.startswith(".")]
    for line in (checkpoint / "requirements.txt").read_text().split():
        assert line.partition(">=")[0] in ("transformers", "open_clip_torch", "timm", "pillow")


def test_no_file_of_code_asks_for_this_package(checkpoint):
    rooms = (
        "modeling_ita.",
        "ita_segmentation.evaluation",
        "ita_segmentation.data",
        "ita_segmentation.training",
    )
    files = ("configuration_ita import", "image_processing_ita import", "pipeline_ita import")
    for name in CODE_FILES:
        for line in (checkpoint / name).read_text().splitlines():
            assert not any(
                line.strip().startswith((f"from {room}", f"import {room}")) for room in rooms + files
            ), (
                name,
                line,
            )


def test_saved_again_the_folder_brings_image_processor_and_examples_along(checkpoint, model, tmp_path):
    model.save_pretrained(tmp_path)
    assert (tmp_path / "preprocessor_config.json").read_text() == (
        checkpoint / "preprocessor_config.json"
    ).read_text()
    assert (tmp_path / "examples" / "red.png").read_bytes() == (
        checkpoint / "examples" / "red.png"
    ).read_bytes()
    assert ModelCard.load(tmp_path / "README.md").data.widget[0]["src"] == "examples/red.png"


def test_an_image_processor_that_is_there_stays(model, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text("{}")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "preprocessor_config.json").read_text() == "{}"


def test_code_collected_from_flat_files_is_the_same_code(checkpoint, tmp_path, monkeypatch):
    flat = tmp_path / "flat"
    shutil.copytree(checkpoint, flat)
    monkeypatch.setattr("modeling_ita.checkpoint_code.__file__", str(flat / "checkpoint_code.py"))
    assert collect_code() == {name: (checkpoint / name).read_text() for name in CODE_FILES}


def test_code_that_is_nowhere_stops_saving_before_anything_is_written(model, tmp_path, monkeypatch):
    monkeypatch.setattr("modeling_ita.checkpoint_code.CODE_FILES", ("missing_part.py",))
    with pytest.raises(FileNotFoundError, match=r"missing_part\.py"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


class FakeHub:
    """Takes what is pushed, and has a card already where `card` is given."""

    def __init__(self, monkeypatch, card: str | None = None):
        self.files: dict[str, bytes] = {}
        monkeypatch.setattr(hub, "hf_api", lambda: self)
        monkeypatch.setattr(hub.PushToHubMixin, "_upload_modified_files", self.take)
        monkeypatch.setattr(hub, "create_and_tag_model_card", self.card_of)
        self.card = card
        self.form = hub.ModelCard.from_template(
            hub.ModelCardData(library_name="transformers"),
            model_description="It was automatically generated.",
        )

    def create_repo(self, repo_id, **kwargs):
        return type("Repo", (), {"repo_id": repo_id})

    def card_of(self, *args, **kwargs):
        return self.form if self.card is None else ModelCard(self.card)

    def take(self, working_dir, repo_id, *args, **kwargs):
        self.files = {path.name: path.read_bytes() for path in Path(working_dir).iterdir() if path.is_file()}


def test_a_push_takes_code_and_card_along(model, monkeypatch):
    pushed = FakeHub(monkeypatch)
    model.push_to_hub("someone/segmenter")
    assert set(pushed.files) >= BESIDE_CODE | set(CODE_FILES)
    card = pushed.files["README.md"].decode()
    assert 'model="someone/segmenter"' in card
    assert "More Information Needed" not in card
    assert ModelCard(card).data.pipeline_tag == "image-segmentation"


def test_a_push_keeps_the_card_that_a_person_wrote_on_the_hub(model, monkeypatch):
    pushed = FakeHub(monkeypatch, "---\nlicense: mit\n---\n\n# Mine\n\nMy words.\n")
    model.push_to_hub("someone/segmenter")
    card = ModelCard(pushed.files["README.md"].decode())
    assert card.text.strip() == "# Mine\n\nMy words."
    assert (card.data.license, card.data.library_name) == ("mit", "transformers")


def test_importing_the_package_registers_the_zero_shot_task():
    assert "zero-shot-image-segmentation" in PIPELINE_REGISTRY.get_supported_tasks()
    assert modeling_ita.ITAConfig.model_type == "ita"


@pytest.mark.parametrize("same_name", [True, False], ids=["folders of one name", "folders of two names"])
def test_folders_with_different_code_keep_their_own_behaviour_in_one_process(checkpoint, tmp_path, same_name):
    """In a process of its own, where this package's classes are not registered."""
    folders = [tmp_path / "one" / "model", tmp_path / "two" / ("model" if same_name else "other")]
    for folder in folders:
        shutil.copytree(checkpoint, folder)
    changed = folders[1] / "modeling_ita.py"
    text = changed.read_text()
    assert text.count("final = merge_classes(") == 1
    changed.write_text(text.replace("final = merge_classes(", "final = 2 * merge_classes("))
    reader = folders[1] / "image_processing_ita.py"
    reader.write_text(reader.read_text().replace("MASK_STRIDE = 4", "MASK_STRIDE = 8", 1))
    script = tmp_path / "load.py"
    script.write_text(
        "import json, sys, torch\n"
        "from transformers import AutoImageProcessor, AutoModel\n"
        "pixels = torch.linspace(-1, 1, 3 * 64 * 64).view(1, 3, 64, 64)\n"
        "models = [AutoModel.from_pretrained(one, trust_remote_code=True).eval() for one in sys.argv[1:] * 2]\n"
        "readers = [AutoImageProcessor.from_pretrained(one, trust_remote_code=True) for one in sys.argv[1:] * 2]\n"
        "with torch.no_grad():\n"
        "    sums = [model(pixels).class_queries_logits.sum().item() for model in models]\n"
        "strides = [sys.modules[type(one).__module__].MASK_STRIDE for one in readers]\n"
        "print(json.dumps([sums, strides]))\n"
    )
    environment = {
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-P", str(script), *map(str, folders)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    sums, strides = json.loads(done.stdout.splitlines()[-1])
    assert sums == [sums[0], 2 * sums[0]] * 2
    assert strides == [4, 8, 4, 8]
