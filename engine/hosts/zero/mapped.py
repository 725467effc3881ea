"""Optimizer states, and parameters, in files that are mapped into memory.

The kernel writes pages out when memory is scarce and reads them back when they are used, so that the states of a model
may be larger than the memory of its machines. Everything else, checkpoints included, works as with offloading to the
host's memory.

Differs: DeepSpeed's own offloading to NVMe (ZeRO-Infinity, arXiv 2104.07857) reads and writes ahead of use by libaio,
    from pinned buffers, and is faster. It needs a compiled extension, and states in its swap files cannot be read by
    name for a checkpoint that is independent of the layout.
"""

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.errors import PlanError


class MappedFiles:
    """Tensors whose memory is files of one folder.

    A file is unlinked once it is mapped: its space is freed when the process ends, also by a crash.
    """

    def __init__(self, folder: Path) -> None:
        """Makes the folder, if it is not there."""
        self._folder = folder

    def zeros_like(self, tensor: Tensor) -> Tensor:
        """Zeros of a tensor's type and number of elements, in a new file.

        Raises:
            PlanError: The folder cannot be made or written to, or has no room.
        """
        if tensor.numel() == 0:
            return torch.zeros_like(tensor, device="cpu")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix="omnivl-", suffix=".states", dir=self._folder)
            try:
                # Space is allocated now: on a full disk the process would be killed without a message when a page is
                # first written.
                os.posix_fallocate(handle, 0, tensor.numel() * tensor.element_size())
                return torch.from_file(name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
            finally:
                os.close(handle)
                Path(name).unlink()
        except OSError as error:
            got = f"{str(self._folder)!r}, which does not take {tensor.numel() / 1e6:.0f} M elements ({error.strerror})"
            allowed = "allowed a folder with room on each machine"
            raise PlanError([f"parallel.nvme_folder: got {got}; {allowed}; name another one"]) from error

    def copy_of(self, tensor: Tensor) -> Tensor:
        """A copy of a flat tensor."""
        return self.zeros_like(tensor).copy_(tensor.detach())


def move_to_files(engine: Any, stage: int, folder: Path, *, parameters: bool) -> None:
    """Moves the states that an offloaded optimizer keeps in the host's memory into files.

    Args:
        engine: A ``DeepSpeedEngine`` whose optimizer is offloaded and has not stepped yet.
        stage: 1, 2 or 3.
        folder: Folder of the files.
        parameters: Whether to move this process' share of the trained parameters too; with stage 3.

    Raises:
        PlanError: The folder cannot be used.
    """
    zero, files = engine.optimizer, MappedFiles(folder)
    masters = zero.fp32_partitioned_groups_flat if stage == 3 else zero.single_partition_of_fp32_groups
    for master in masters:
        master.data = files.copy_of(master)
        state = zero.optimizer.state[master]
        assert not state, "the optimizer has stepped"
        state["step"] = torch.zeros((), dtype=torch.float32)
        state.update({name: files.zeros_like(master) for name in zero.optimizer.moment_names(master)})
    if not parameters:
        return
    for index, group in enumerate(zero.fp16_groups):
        flat = files.copy_of(zero.fp16_partitioned_groups_flat[index])
        zero.fp16_partitioned_groups_flat[index] = flat
        offset = 0
        for parameter in group:
            held = parameter.ds_tensor
            held.data = flat.narrow(0, offset, held.ds_numel)
            offset += held.ds_numel
    zero.param_groups_fp16_flat_cpu_memory.clear()
