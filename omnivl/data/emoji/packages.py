"""The npm packages that the set is built from: names, versions, hashes, and their download."""

import hashlib
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from omnivl.errors import DataError

Progress = Callable[[str, int, int], None]
"""Called as (what is being done, how many are done, how many there are)."""


@dataclass(frozen=True)
class Package:
    """An npm package at a fixed version.

    Attributes:
        name: Name in the registry.
        version: Version.
        sha256: Digest of the archive that ``npm pack`` fetches.
    """

    name: str
    version: str
    sha256: str

    @property
    def archive(self) -> str:
        """File name that ``npm pack`` gives: ``@a/b`` 1.0.0 becomes ``a-b-1.0.0.tgz``."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


@dataclass(frozen=True)
class Drawings:
    """Where a style's drawings lie, and under which licence.

    Attributes:
        package: Key in ``PACKAGES``.
        folder: Folder inside the archive.
        suffix: How file names end.
        license: SPDX identifier of the art.
    """

    package: str
    folder: str
    suffix: str
    license: str


EMOJIBASE = "emojibase-data"
PACKAGES: dict[str, Package] = {
    package.name: package
    for package in (
        Package(
            "@lobehub/fluent-emoji-3d", "1.1.0", "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58"
        ),
        Package(
            "@lobehub/fluent-emoji-anim-1", "1.0.0", "4c03ac178c1eabf2e2a16dd498f3cc2b92dc30ec3466ae38fdc497d4774c99ea"
        ),
        Package(
            "@lobehub/fluent-emoji-anim-2", "1.0.0", "e431da8172e394036c330faa77648d6fbbae1fd3b0be95637c4497c9075019c0"
        ),
        Package(
            "@lobehub/fluent-emoji-anim-3", "1.0.0", "3624d0c34c819c1794b74ccf6ae9034adff7c4cb6318dd2a645145f0196feb43"
        ),
        Package(
            "@lobehub/fluent-emoji-anim-4", "1.0.0", "3d4c08f1e321f70808ef4996aba0ab575a9d97b6c56ffffc92cf6161a7836aa3"
        ),
        Package(
            "emoji-datasource-google", "16.0.0", "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438"
        ),
        Package("@discordapp/twemoji", "16.0.1", "2278fd609501e20dc646a546c1d7bbcab86a4c38010ded12b45e61f9687b9d0a"),
        Package("emojibase-data", "17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a"),
        Package("@iconify-json/noto-v1", "1.2.5", "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37"),
        Package("@iconify-json/emojione", "1.2.3", "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e"),
        Package(
            "@iconify-json/fluent-emoji-flat",
            "1.2.6",
            "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        ),
        Package("@iconify-json/fxemoji", "1.2.2", "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef"),
        Package(
            "@iconify-json/streamline-emojis",
            "1.2.4",
            "5dac87c876b322500989828c5823143e0100d78881627a2e4081a4b897cbfdbc",
        ),
    )
}
DRAWINGS: dict[str, Drawings] = {
    "fluent": Drawings("@lobehub/fluent-emoji-3d", "package/assets/", ".webp", "MIT"),
    "noto": Drawings("emoji-datasource-google", "package/img/google/64/", ".png", "Apache-2.0"),
    "twemoji": Drawings("@discordapp/twemoji", "package/dist/svg/", ".svg", "CC-BY-4.0"),
}
STYLES: tuple[str, ...] = tuple(DRAWINGS)
HANDS: dict[str, str] = {
    "noto_v1": "@iconify-json/noto-v1",
    "emojione_v2": "@iconify-json/emojione",
    "fluent_flat": "@iconify-json/fluent-emoji-flat",
    "fxemoji": "@iconify-json/fxemoji",
    "streamline": "@iconify-json/streamline-emojis",
}
"""Further styles, each the package of an icon set that draws some of the concepts."""
ANIMATIONS: tuple[str, ...] = tuple(f"@lobehub/fluent-emoji-anim-{part}" for part in range(1, 5))
ANIMATION_FOLDER = "package/assets/"


def archive_name(name: str) -> str:
    """File name of one of ``PACKAGES``."""
    return PACKAGES[name].archive


def fetch_packages(packages: Path | None, cache: Path, progress: Progress) -> dict[str, Path]:
    """Paths of all archives, verified.

    Args:
        packages: Folder that has them already; None downloads what is missing with ``npm pack`` into ``cache``.
        cache: Folder for downloads.
        progress: Told about each archive.

    Raises:
        DataError: An archive is missing or differs from the pinned one, or npm is missing or fails.
    """
    paths = {}
    for number, (name, package) in enumerate(PACKAGES.items()):
        progress("packages", number, len(PACKAGES))
        paths[name] = fetch_package(package, packages, cache)
    progress("packages", len(PACKAGES), len(PACKAGES))
    return paths


def fetch_package(package: Package, folder: Path | None, cache: Path) -> Path:
    """Path of a package's archive, verified.

    Args:
        package: Which one.
        folder: Has it already; None downloads what is missing with ``npm pack`` into ``cache``.
        cache: Folder for downloads.

    Raises:
        DataError: As ``fetch_packages``.
    """
    path = (cache if folder is None else folder) / package.archive
    wanted = f"{package.name}@{package.version}"
    if not path.is_file():
        if folder is not None:
            raise DataError(
                f"{folder}: no {path.name}; fetch it there with 'npm pack {wanted}', or leave the folder out to have "
                f"it downloaded"
            )
        _download(package, cache)
    digest = file_digest(path)
    if digest != package.sha256:
        raise DataError(
            f"{path}: sha256 is {digest}, expected {package.sha256}; delete the file and fetch it again with "
            f"'npm pack {wanted}'"
        )
    return path


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(package: Package, cache: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise DataError(
            f"npm is not installed, so {package.name} cannot be downloaded; install Node.js, or name a folder with the "
            f"archives"
        )
    cache.mkdir(parents=True, exist_ok=True)
    command = [npm, "pack", f"{package.name}@{package.version}", "--silent", "--pack-destination", str(cache)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise DataError(f"'{' '.join(command[1:])}' failed with status {result.returncode}: {result.stderr.strip()}")
