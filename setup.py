"""Packages the four layers. Settings of the tools live in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

PACKAGES = ("moe", "omnivl", "engine", "launcher")

setup(
    name="omnivl-engine",
    version="0.1.0",
    description="A pretraining engine for vision-language models of images and videos",
    long_description=Path("README.md").read_text(encoding="utf-8") if Path("README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE", "THIRD_PARTY.md"],
    python_requires=">=3.11",
    packages=find_packages(include=[f"{name}{below}" for name in PACKAGES for below in ("", ".*")]),
    package_data={
        "omnivl": ["data/embedded/*/*", "**/*.j2"],
        "engine": ["**/*.j2"],
        "launcher": ["serve/page/*"],
    },
    # Lower bounds only: a cluster brings its own torch. requirements.txt pins what was tested together.
    install_requires=[
        "annotated-types>=0.6",
        "av>=12",
        "deepspeed>=0.19",
        "jinja2>=3.1",
        "markupsafe>=2.1",
        "numpy>=1.26",
        "opencv-python-headless>=4.9",
        "pandas>=2.2",
        "pillow>=10.3",
        "plotly>=5.20",
        "psutil>=5.9",
        "pyarrow>=15",
        "pydantic>=2.7",
        "pyyaml>=6",
        "rich>=13.7",
        "sacrebleu>=2.4",
        "safetensors>=0.4.3",
        "simplejpeg>=1.7",
        "scipy>=1.11",
        "tensorboard>=2.16",
        "tokenizers>=0.19",
        "torch>=2.9",
        "transformers>=4.57",
        "typer>=0.12",
        "webdataset>=0.2.100",
    ],
    extras_require={
        "data": ["resvg-py>=0.1.6"],
        "demo": ["faiss-cpu>=1.9"],
        "gpu": ["megablocks[gg]>=0.7"],
        "pictures": ["kaleido>=1"],
        "mpi": ["mpi4py>=4", "openmpi>=5"],
        "tasks": ["pycocoevalcap>=1.2", "pycocotools>=2.0.7"],
        "dev": [
            "codespell>=2.3",
            "import-linter>=2.1",
            "mypy>=1.10",
            "pre-commit>=3.7",
            "pytest>=8.2",
            "pytest-timeout>=2.3",
            "ruff>=0.6",
            "types-PyYAML>=6",
        ],
    },
    entry_points={"console_scripts": ["omnivl=omnivl.__main__:main"]},
)
