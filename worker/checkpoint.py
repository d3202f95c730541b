"""Checkpoint files: tensors and a JSON state in one safetensors file, whole or not there at all, never pickled."""

import hashlib
import json
import os
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from service.contract.marks import mark
from worker.channel import CheckpointMessage
from worker.engine.observer import Saved

FORMAT = 3  # counts up when a state of before cannot be taken up any more
STATE_KEY = "rankpress_state"  # the only key: of several, safetensors does not keep the order


class OtherFormatError(Exception):
    """The checkpoint was written by a release whose states this one does not know."""


def write_checkpoint(saved: Saved, directory: Path, position: int) -> CheckpointMessage:
    """Write a checkpoint: temporary file, fsync, hash, rename, fsync of the directory.

    Parameters
    ----------
    saved : Saved
        Contiguous tensors on the CPU, which are written from where they lie, and a state that JSON can hold.
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
    state = json.dumps({"format": FORMAT, **saved.state})
    save_file(dict(saved.tensors), temporary, metadata={STATE_KEY: state})
    with temporary.open("rb") as stream:
        os.fsync(stream.fileno())
        mark("checkpoint_written")
        digest = hashlib.file_digest(stream, "sha256")  # of pages that are in memory still
        size = os.fstat(stream.fileno()).st_size
    temporary.rename(final)
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    mark("checkpoint_renamed")
    return CheckpointMessage(path=str(final), sha256=digest.hexdigest(), bytes=size, position=position)


def read_checkpoint(path: Path) -> Saved:
    """Read a checkpoint back, into memory of its own.

    Raises
    ------
    ValueError
        When the file holds no state.
    OtherFormatError
        When another release wrote it in another format.
    """
    with safe_open(path, framework="pt") as stream:
        metadata = stream.metadata() or {}
        if STATE_KEY not in metadata:
            raise ValueError(f"{path.name} holds no state of a run")
        state = json.loads(metadata[STATE_KEY])
        if (found := state.pop("format", 1)) != FORMAT:
            raise OtherFormatError(f"the checkpoint has format {found} and this release reads {FORMAT}")
        # Copies: a tensor inside of the file may lie where products of matrices round otherwise than at full alignment.
        tensors = {name: stream.get_tensor(name).clone() for name in stream.keys()}  # noqa: SIM118
        return Saved(tensors, state)
