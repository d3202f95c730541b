"""Second stage of a job: the artifact, made in a fresh process from the reference's file and the final state.

Scripting numbers its types per process and orders some of what it writes by hash, so the same bytes come again only
from a fresh process with a fixed hash seed; and an edited module that has run may keep an old plan (design section 5).
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from service.contract.errors import ErrorCode, ProblemError
from worker.engine.file_size import artifact_bytes
from worker.engine.learn import FINAL_PLAN, FINAL_STATE

ARTIFACT = "artifact.pt"


def emit(model: Path, work_dir: Path) -> dict[str, Any]:
    """Write the artifact beside the final state.

    Parameters
    ----------
    model : Path
        The reference's file.
    work_dir : Path
        Holds the final state and recipe; receives ``artifact.pt``.

    Returns
    -------
    dict
        ``path``, ``bytes`` and ``sha256`` of the artifact.

    Raises
    ------
    ProblemError
        ``CONSTRAINT_UNREACHABLE`` when the file is not smaller than the reference's.
    """
    plan = json.loads((work_dir / FINAL_PLAN).read_text(encoding="utf-8"))
    content = artifact_bytes(model, plan["recipe"], load_file(work_dir / FINAL_STATE))
    reference_bytes = model.stat().st_size
    if len(content) >= reference_bytes:
        raise ProblemError(
            ErrorCode.CONSTRAINT_UNREACHABLE,
            f"the compressed file has {len(content)} bytes, the model's {reference_bytes}: nothing is gained at this "
            "size. Ask for a smaller budget, or compress a larger model",
        )
    if plan["metric"] == "bytes" and plan["limit"] is not None and len(content) > plan["limit"]:
        raise ProblemError(
            ErrorCode.CONSTRAINT_UNREACHABLE,
            f"the compressed file has {len(content)} bytes, the budget allows {plan['limit']}: its code and the places "
            "of its tensors take more than was expected. Raise the budget a little, or let fewer layers be compressed",
        )
    path = work_dir / ARTIFACT
    path.write_bytes(content)
    return {"path": str(path), "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
