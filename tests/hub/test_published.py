"""Published checkpoints: the registry, the download with all that can go wrong, and the conversion by name."""

import contextlib
import gzip
import http.server
import json
import threading
from urllib.parse import parse_qs, urlsplit

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from transformers import AutoImageProcessor, AutoModel

from helpers.published_fcclip import CLIP, KEYS, SHRUNKEN_CLIP_CONFIG, published_keys, published_tensors
from ita_segmentation.cli.convert import convert
from ita_segmentation.cli.models import models
from ita_segmentation.conversion import convert_config
from ita_segmentation.data.categories import load_categories
from ita_segmentation.errors import ITAError, UsageError
from ita_segmentation.hub import download as download_module
from ita_segmentation.hub import registry
from ita_segmentation.hub.download import download

NAME = "fc-clip-convnext-large"
PUBLIC = json.loads(gzip.decompress(KEYS.read_bytes()))
KEY_TO_NAME = {
    "fcclip_l_maskadapter": "mask-adapter-fc-clip-convnext-large",
    "maftp_b": "maft-plus-base",
    "maftp_b_maskadapter": "mask-adapter-maft-plus-base",
    "maftp_l": "maft-plus-large",
    "maftp_l_maskadapter": "mask-adapter-maft-plus-large",
    "maftp_l_pano": "maft-plus-large-panoptic",
}
CONFIRMATION = """<html><head><title>Virus scan warning</title></head><body>
<form id="download-form" action="/download" method="get"><input type="submit" value="Download anyway">
<input type="hidden" name="id" value="{id}"><input type="hidden" name="export" value="download">
<input type="hidden" name="confirm" value="t"><input type="hidden" name="uuid" value="a-b"></form></body></html>"""


class Drive(http.server.BaseHTTPRequestHandler):
    """Answers as Google Drive does: a page that asks for confirmation, then the file, whole or a range of it."""

    files: dict[str, bytes]
    log: list[tuple[str, str | None]]
    break_after: list[int]  # bytes after which the next answers break off
    etag = '"one"'

    def do_GET(self):
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        self.log.append((url.path, self.headers["Range"]))
        content = self.files.get(query.get("id", ""))
        if url.path == "/quota":
            self.page("<html><head><title>Quota exceeded</title></head></html>")
        elif content is None:
            self.send_error(404)
        elif url.path == "/uc":
            self.page(CONFIRMATION.format(id=query["id"]))
        elif (query.get("confirm"), query.get("uuid")) == ("t", "a-b"):
            self.file(content)

    def page(self, text: str):
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def file(self, content: bytes):
        start = 0
        if self.headers["Range"] and self.headers["If-Range"] == self.etag:
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("ETag", self.etag)
        self.end_headers()
        rest = content[start:]
        # The file's address is asked first to see what it is, and then for its content.
        if self.break_after and len(self.log) % 3 == 0:
            rest = rest[: self.break_after.pop(0)]
        with contextlib.suppress(OSError):  # the client has seen enough
            self.wfile.write(rest)
        self.close_connection = True

    def log_message(self, *arguments):
        """Say nothing."""


@pytest.fixture
def drive(monkeypatch, tmp_path):
    """A server on this machine, and an empty folder for downloads."""
    handler = type("Handler", (Drive,), {"files": {}, "log": [], "break_after": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    handler.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("ITA_DOWNLOADS", str(tmp_path / "downloads"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(download_module, "PAUSE", 0.0)
    yield handler
    server.shutdown()
    thread.join()
    server.server_close()


def receipt(tmp_path, name="model.pth"):
    return json.loads((tmp_path / "downloads" / f"{name}.json").read_text())


def test_a_download_answers_the_confirmation_page_and_leaves_a_receipt(drive, tmp_path, capsys):
    drive.files["x1"] = content = bytes(range(256)) * 5000
    path = download(f"{drive.url}/uc?id=x1", "model.pth")
    assert path.read_bytes() == content
    assert "model.pth" in capsys.readouterr().err  # the progress bar
    assert receipt(tmp_path)["bytes"] == len(content)
    assert sorted(one.name for one in path.parent.iterdir()) == ["model.pth", "model.pth.json"]
    drive.log.clear()
    assert download(f"{drive.url}/uc?id=x1", "model.pth") == path
    assert drive.log == []  # there already


def test_a_download_that_breaks_off_is_resumed_where_it_was(drive):
    drive.files["x1"] = content = bytes(range(256)) * 5000
    drive.break_after += [300_000, 400_000]
    assert download(f"{drive.url}/uc?id=x1", "model.pth").read_bytes() == content
    assert [given for _, given in drive.log if given] == ["bytes=300000-", "bytes=700000-"]


def test_a_file_that_changed_in_between_is_downloaded_anew(drive, monkeypatch, tmp_path):
    drive.files["x1"] = bytes(1_000_000)
    drive.break_after += [300_000] + [0] * 10
    with pytest.raises(ITAError, match=r"broke off after 0 MB .*repeat it to resume"):
        download(f"{drive.url}/uc?id=x1", "model.pth")
    assert (tmp_path / "downloads" / "model.pth.part").stat().st_size == 300_000
    drive.files["x1"] = content = bytes(range(250)) * 4000
    drive.etag = '"two"'
    drive.break_after.clear()
    assert download(f"{drive.url}/uc?id=x1", "model.pth").read_bytes() == content


def test_a_checksum_that_is_known_must_be_met_and_the_first_one_is_remembered(drive, tmp_path):
    url = f"{drive.url}/uc?id=x1"
    drive.files["x1"] = b"one"
    with pytest.raises(ITAError, match="SHA-256 .*, not 0000"):
        download(url, "model.pth", sha256="0000")
    path = download(url, "model.pth")  # nothing is known of it: trusted on first use
    path.unlink()
    drive.files["x1"] = b"two"
    with pytest.raises(ITAError, match=receipt(tmp_path)["sha256"]):
        download(url, "model.pth")
    assert not path.exists()


def test_what_stops_a_download_is_one_line(drive, monkeypatch):
    with pytest.raises(ITAError, match="model.pth cannot be downloaded from .*: 404"):
        download(f"{drive.url}/uc?id=unknown", "model.pth")
    with pytest.raises(ITAError, match=r"a page \('Quota exceeded'\) and not with the file.*--checkpoint"):
        download(f"{drive.url}/quota", "model.pth")
    with pytest.raises(ITAError, match=r"no answer from 127\.0\.0\.1:1 "):
        download("http://127.0.0.1:1/uc?id=x1", "model.pth")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    drive.log.clear()
    with pytest.raises(ITAError, match="not downloaded yet and offline mode is on"):
        download(f"{drive.url}/uc?id=x1", "model.pth")
    assert drive.log == []


def test_the_registry_is_complete_and_its_checkpoints_can_be_built():
    from open_clip import list_pretrained_tags_by_model

    checkpoints = registry.published_checkpoints()
    assert {one.family for one in checkpoints.values()} == {"fc-clip", "maft-plus", "mask-adapter"}
    assert len({one.url for one in checkpoints.values()}) == len(checkpoints) == 12
    for one in checkpoints.values():
        model, tag = one.clip.split(":")
        assert tag in list_pretrained_tags_by_model(model), one.name
        assert one.url.startswith("https://drive.google.com/") and one.license and one.scores, one.name
        assert len(load_categories(one.train_vocabulary)) in (133, 171), one.name
    shapes = published_keys().values()
    assert checkpoints[NAME].parameters == sum(torch.Size(shape).numel() for shape in shapes)


@pytest.mark.parametrize("key", PUBLIC)
def test_the_registry_agrees_with_what_tensors_show(key):
    """The registry's settings, where tensors show them, are those of the file; both are needed where they do not."""
    (entry,) = [one for one in registry.published_checkpoints().values() if one.name == KEY_TO_NAME[key]]
    tensors = {name: torch.empty(shape, device="meta") for name, shape in PUBLIC[key]["keys"].items()}
    model = entry.clip.partition(":")[0]
    shown, told = (convert_config(tensors, model, **given) for given in ({}, entry.config))
    assert shown.to_dict() == told.to_dict()
    counted = {
        name: tensor for name, tensor in tensors.items() if not name.startswith(("backbone_t.", "criterion."))
    }
    assert entry.parameters == sum(tensor.numel() for tensor in counted.values())


def test_published_checkpoints_are_listed(capsys):
    models([])
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith(("fc-clip", "maft-plus", "mask-adapter"))]) == 12
    assert any(NAME in line and "34.1" in line and "1.5 GB" in line for line in lines)
    models([NAME])
    assert "drive.google.com" in capsys.readouterr().out
    with pytest.raises(UsageError, match="no published checkpoint is called 'fc-clap'"):
        models(["fc-clap"])


@pytest.fixture
def published(drive, monkeypatch, tmp_path):
    """The registry with a checkpoint of the published keys on the server; returns a function that puts it there."""
    entry = json.loads(registry.REGISTRY.read_text())[NAME]
    (tmp_path / "registry.json").write_text(
        json.dumps({NAME: {**entry, "url": f"{drive.url}/uc?id=x1", "sha256": None}})
    )
    monkeypatch.setattr(registry, "REGISTRY", tmp_path / "registry.json")
    registry.published_checkpoints.cache_clear()

    def put(tensors):
        torch.save({"model": tensors, "iteration": 7}, tmp_path / "original.pth")
        drive.files["x1"] = (tmp_path / "original.pth").read_bytes()
        (tmp_path / "original.pth").unlink()

    yield put
    registry.published_checkpoints.cache_clear()


def check_converted(folder, tensors):
    """The folder loads, knows COCO's classes, and holds the very tensors."""
    model = AutoModel.from_pretrained(folder).eval()
    config = model.config
    assert (config.num_learned_queries, config.num_dominant_categories) == (250, 0)
    assert (config.encoder_layers, config.decoder_layers, config.decoder_self_attention) == (6, 9, True)
    assert len(config.train_vocabulary) == len(config.vocabulary) == 133
    assert "sky" in config.stuff_names and "person" not in config.stuff_names
    assert config.domain == "photographs (COCO)"
    state = model.state_dict()
    assert torch.equal(state["void_embedding"], tensors["void_embedding.weight"])
    trunk = "visual.trunk.stages.2.blocks.26.mlp.fc1.weight"
    assert torch.equal(state[f"clip_backbone.clip.{trunk}"], tensors[f"{CLIP}{trunk}"])
    assert AutoImageProcessor.from_pretrained(folder).size.shortest_edge == 800
    card = (folder / "README.md").read_text()
    assert "license: apache-2.0" in card and f"# {folder.name}\n" in card
    return model


@torch.no_grad()
def test_a_published_checkpoint_is_downloaded_and_converted_by_name(published, tmp_path, capsys):
    tensors = published_tensors(shrunken=True)
    published(tensors)
    (tmp_path / "clip.json").write_text(json.dumps(SHRUNKEN_CLIP_CONFIG))
    output = tmp_path / "models" / "fc-clip"
    convert([NAME, "--clip_model", str(tmp_path / "clip.json"), "--output", str(output)])
    assert "FC-CLIP, 2.4 M parameters, 133 classes" in capsys.readouterr().out
    model = check_converted(output, tensors)
    outputs = model(torch.randn(1, 3, 64, 64), vocabulary=["cat", "dog"])
    assert outputs.class_queries_logits.shape == (1, 250, 3)
    with pytest.raises(ITAError, match="exists and is not empty"):
        convert([NAME, "--output", str(output)])


def test_a_file_without_its_clip_takes_it_from_the_clips_own_release(published, tmp_path):
    """As FC-CLIP's published files are."""
    tensors = published_tensors(shrunken=True)
    published({key: tensor for key, tensor in tensors.items() if not key.startswith(CLIP)})
    clip = tmp_path / "clip"
    clip.mkdir()
    (clip / "open_clip_config.json").write_text(json.dumps({"model_cfg": SHRUNKEN_CLIP_CONFIG}))
    weights = {key.removeprefix(CLIP): tensor for key, tensor in tensors.items() if key.startswith(CLIP)}
    save_file(weights, clip / "open_clip_model.safetensors")
    output = tmp_path / "fc-clip"
    convert([NAME, "--clip", str(clip), "--output", str(output)])
    check_converted(output, tensors)


@pytest.mark.slow
@torch.no_grad()
def test_the_checkpoint_at_full_size(published, tmp_path):
    """1.5 GB, four times on disk."""
    tensors = published_tensors(shrunken=False)
    published(tensors)
    output = tmp_path / "fc-clip"
    convert([NAME, "--output", str(output)])
    model = check_converted(output, tensors)
    assert model.config.clip_model_name == "convnext_large_d_320"
    assert model(torch.randn(1, 3, 64, 64), vocabulary=["cat", "dog"]).class_queries_logits.isfinite().all()
