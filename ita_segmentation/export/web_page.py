"""A folder that any server of static files serves: the exported checkpoint and a page that runs it in the browser.

Its parts that show class names and results are those of `ita app`, wrapped as modules.
"""

import json
import shutil
from pathlib import Path

import ita_segmentation
from ita_segmentation.errors import ITAError
from ita_segmentation.export.ita_onnx.predictor import IMAGE_NETWORK, TEXT_NETWORK
from ita_segmentation.files import read_text, write_files
from ita_segmentation.images import read_image
from ita_segmentation.visualization import PALETTE, color_distances

SOURCES = Path(__file__).parent / "web"
APP_PARTS = Path(ita_segmentation.__file__).parent / "app" / "web"
RUNTIME_VERSION = "1.30.0"
RUNTIME_URL = f"https://cdn.jsdelivr.net/npm/onnxruntime-web@{RUNTIME_VERSION}/dist/"
RUNTIME_FILES = {
    "ort.webgpu.bundle.min.mjs": "ort-wasm-simd-threaded.asyncify.wasm",
    "ort.wasm.bundle.min.mjs": "ort-wasm-simd-threaded.wasm",
}
"""Scripts of onnxruntime-web with and without WebGPU, and the WebAssembly that each one loads."""
RUNTIME_FOLDER = "onnxruntime"
MAX_GRAPH_BYTES = 2**31 - 1
"""What a browser's buffer holds."""
LOADER = """\
// ONNX Runtime Web, with WebGPU or without.
export async function load(withGpu) {
  return import(SOURCE + (withGpu ? 'ort.webgpu.bundle.min.mjs' : 'ort.wasm.bundle.min.mjs'));
}
"""


def write_web_page(folder: Path, checkpoint: Path, runtime: Path | None = None) -> None:
    """Add the page to a folder that `write_onnx_folder` wrote.

    Args:
        folder: where to write.
        checkpoint: whose `examples` are offered, if it has any.
        runtime: folder of the npm package onnxruntime-web, to be copied; None to load it from jsDelivr.

    Raises:
        ITAError: a file cannot be written, the runtime's are missing, or a network is too large for a browser.
    """
    for name in (IMAGE_NETWORK, TEXT_NETWORK):
        if (folder / f"{name}.data").exists() or (folder / name).stat().st_size > MAX_GRAPH_BYTES:
            raise ITAError(f"{folder / name} is too large for a browser, which takes up to 2 GB")
    contents = {file.name: file.read_bytes() for file in SOURCES.iterdir() if file.is_file()}
    for name in ("names.html", "viewer.html", "page.css"):
        contents[name] = (APP_PARTS / name).read_bytes()
    for name in ("names.js", "viewer.js"):
        script = read_text(APP_PARTS / name)
        contents[name] = f"export default function (element, props, watch) {{\n{script}\n}}\n".encode()
    palette = {"PALETTE": PALETTE, "DISTANCES": color_distances().round(4).tolist()}
    lines = [f"export const {name} = {json.dumps(value)};\n" for name, value in palette.items()]
    contents["palette.js"] = "".join(lines).encode()
    contents["onnxruntime.js"] = _runtime_script(folder, runtime).encode()
    examples = json.dumps(_copy_examples(folder, checkpoint), ensure_ascii=False)
    contents["examples.js"] = f"export default {examples};\n".encode()
    write_files({folder / name: content for name, content in contents.items()})


def _runtime_script(folder: Path, runtime: Path | None) -> str:
    if runtime is None:
        return f"const SOURCE = {json.dumps(RUNTIME_URL)};\n{LOADER}"
    source = runtime / "dist" if (runtime / "dist").is_dir() else runtime
    files = [source / name for pair in RUNTIME_FILES.items() for name in pair]
    missing = next((file for file in files if not file.is_file()), None)
    if missing is not None:
        raise ITAError(
            f"{runtime} is not the npm package onnxruntime-web {RUNTIME_VERSION}: it has no {missing.name}"
        )
    write_files({folder / RUNTIME_FOLDER / file.name: file.read_bytes() for file in files})
    return f"const SOURCE = new URL('./{RUNTIME_FOLDER}/', import.meta.url).href;\n{LOADER}"


def _copy_examples(folder: Path, checkpoint: Path) -> list[dict]:
    """Copy a checkpoint's examples; give the name, URL and class names of each."""
    source = checkpoint / "examples"
    if not (source / "classes.json").is_file():
        return []
    found = []
    for name, classes in json.loads(read_text(source / "classes.json")).items():
        if (source / name).is_file():
            read_image(source / name)
            (folder / "examples").mkdir(exist_ok=True)
            shutil.copyfile(source / name, folder / "examples" / name)
            tags = [one.strip() for one in classes.split(",") if one.strip()]
            found.append({"name": name, "url": f"examples/{name}", "classes": tags})
    return found
