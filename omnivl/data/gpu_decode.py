"""Decoding on a GPU by TorchCodec: JPEGs by nvJPEG, clips by NVDEC (``loader.decode: gpu``).

TorchCodec need not be installed. What it would show otherwise than the CPU does (pictures and clips that their file
turns or mirrors, transparent clips, JPEGs in the colours of print) is decoded by the CPU.

Shapes: T frames, H x W pixels; results are uint8, RGB.
"""

import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from omnivl.errors import DataError

_LEAST_VERSION = (0, 16)
_INSTALL = "`pip install 'torchcodec>=0.16'` (built for the CUDA of the installed torch), or set loader.decode to cpu"


def gpu_for_decoding(start_method: str, num_workers: int) -> str:
    """The device that decodes, which is this process's own.

    Args:
        start_method: How workers are started.
        num_workers: Their number.

    Raises:
        DataError: There is no GPU or no TorchCodec, or workers could not use a GPU.
    """
    where = "loader.decode: got gpu"
    if importlib.util.find_spec("torchcodec") is None:
        raise DataError(f"{where}, which needs TorchCodec, and it is not installed; {_INSTALL}")
    version = metadata.version("torchcodec")
    if tuple(int(part) for part in version.split("+")[0].split(".")[:2]) < _LEAST_VERSION:
        raise DataError(f"{where}, and TorchCodec {version}; allowed 0.16 and later; {_INSTALL}")
    if not torch.cuda.is_available():
        raise DataError(f"{where}, and torch finds no CUDA device; allowed on machines with one; set it to cpu")
    if num_workers > 0 and start_method == "fork":
        raise DataError(
            f"{where} with loader.start_method fork: a forked process cannot use CUDA; allowed forkserver and spawn"
        )
    return f"cuda:{torch.cuda.current_device()}"


def jpeg_on_gpu(media: bytes, device: str) -> NDArray[np.uint8]:
    """Decodes a JPEG in full to ``[H, W, 3]``, as it is stored.

    Source: ``torchcodec.decoders.decode_jpeg``, TorchCodec 0.16.

    Raises:
        DataError: The GPU has failed; any other error is one of the file.
    """
    with _naming_failures_of(device):
        decoded: torch.Tensor = _decoders().decode_jpeg(media, device=device)
        pixels: NDArray[np.uint8] = decoded.expand(3, -1, -1).permute(1, 2, 0).contiguous().cpu().numpy()
    return pixels


def frames_on_gpu(media: bytes, wanted: list[int], device: str) -> NDArray[np.uint8]:
    """Decodes frames of a clip to ``[T, H, W, 3]``, as they are stored.

    Args:
        media: The file.
        wanted: Numbers of the frames in the order of their times.
        device: See ``gpu_for_decoding``.

    Source: ``torchcodec.decoders.VideoDecoder``, TorchCodec 0.16.

    Raises:
        DataError: The GPU has failed; any other error is one of the file.
    """
    with _naming_failures_of(device):
        decoder = _decoders().VideoDecoder(media, dimension_order="NHWC", device=device, seek_mode="exact")
        frames: NDArray[np.uint8] = decoder.get_frames_at(indices=wanted).data.cpu().numpy()
    return frames


@contextmanager
def _naming_failures_of(device: str) -> Iterator[None]:
    """Tells failures of a GPU from those of a file: no sample may count as bad because of the former.

    Raises:
        DataError: Something failed, and the GPU is out of memory or computes no longer.
    """
    try:
        yield
    except Exception as error:
        failure = error if _says_out_of_memory(error) else _failure_of(device)
        if failure is None:
            raise
        said = next(iter(str(failure).splitlines()), "")
        raise DataError(
            f"loader.decode: got gpu, and {device} failed while it decoded: {type(failure).__name__}: {said}; no "
            "sample is to blame; start again, with fewer loader.num_workers or a smaller micro-batch if its memory is "
            "full, or set loader.decode to cpu"
        ) from error


def _says_out_of_memory(error: Exception) -> bool:
    """Whether memory was lacking, after which a GPU still computes. Errors of NVDEC say so in their text alone."""
    said = "".join(letter for letter in str(error).lower() if letter.isalpha())
    return isinstance(error, torch.OutOfMemoryError) or "outofmemory" in said


def _failure_of(device: str) -> Exception | None:
    """The error of a sum on the GPU, where every call fails after an error of CUDA; None where it succeeds."""
    try:
        torch.ones(2, device=device).sum().item()
    except Exception as error:  # of any type: nothing is wrong with the sum
        return error
    return None


def _decoders() -> Any:
    """Imported where it is used: it need not be installed."""
    return importlib.import_module("torchcodec.decoders")
