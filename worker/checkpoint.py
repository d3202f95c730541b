"""Checkpoint files: tensors and a JSON state in one safetensors file, whole or not there at all, never pickled."""

import hashlib
import json
import os
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from worker.channel import CheckpointMessage
from worker.engine.observer import Saved

STATE_KEY = "rankpress_state"
_READ_BYTES = 1 << 20


def write_checkpoint(saved: Saved, directory: Path, position: int) -> CheckpointMessage:
    """Write a checkpoint: temporary file, fsync, hash, rename, fsync of the directory.

    Parameters
    ----------
    saved : Saved
        Tensors on the CPU, contiguous, and a state that JSON can hold.
    directory : Path
        Where it goes; made if it is missing.
    position : int
        Its place in the run, in optimizer updates; part of the name.

    Returns
    -------
    CheckpointMessage
        Path, SHA-256 and size of the complete file.
    """
    directory.mkdir(parents=True, exist_ok=True)
    final = directory / f"position-{position:09d}.safetensors"
    temporary = final.with_suffix(".tmp")
    save_file(dict(saved.tensors), temporary, metadata={STATE_KEY: json.dumps(dict(saved.state))})
    digest = hashlib.sha256()
    with temporary.open("rb+") as stream:
        os.fsync(stream.fileno())
        while block := stream.read(_READ_BYTES):
            digest.update(block)
    temporary.rename(final)
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    return CheckpointMessage(path=str(final), sha256=digest.hexdigest(), bytes=final.stat().st_size, position=position)


def read_checkpoint(path: Path) -> Saved:
    """Read a checkpoint back.

    Raises
    ------
    ValueError
        When the file holds no state.
    """
    with safe_open(path, framework="pt") as stream:
        metadata = stream.metadata() or {}
        if STATE_KEY not in metadata:
            raise ValueError(f"{path.name} holds no state of a run")
        return Saved({name: stream.get_tensor(name) for name in stream.keys()}, json.loads(metadata[STATE_KEY]))  # noqa: SIM118
