"""The last step of an attempt: its files become blobs, and they and the job's end count in one transaction."""

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path, PurePath

from sqlalchemy.orm import Session

from service.blobs.errors import BlobStoreAwayError
from service.blobs.store import BlobStore
from service.contract.errors import ErrorCode
from service.contract.marks import mark
from service.contract.resources import ResultSummary
from service.store.artifacts import insert_artifact
from service.store.attempts import Claim, finish_succeeded
from service.store.blobs import hold_blobs
from service.store.models import get_model
from worker.channel import ARTIFACT_FILE, REPORT_FILE
from worker.child import regular_file
from worker.endings import Done, Ending, failed
from worker.lease import Lease

_MODEL_SUFFIXES = frozenset({".pt", ".pth", ".ts", ".jit", ".torchscript"})


def store_results(
    verified: Done, claim: Claim, lease: Lease, blobs: BlobStore, work_dir: Path, go_on: Callable[[], None]
) -> Ending:
    """Store the artifact and the report of a verified attempt and end the job as succeeded.

    Raises
    ------
    LeaseLostError
        When the attempt is not the live one; nothing counts then.
    StopAskedError
        What `go_on` raises, while the files are on their way.
    ChannelBrokenError
        When the stages did not leave the files they spoke of.
    """
    artifact = regular_file(work_dir / ARTIFACT_FILE, work_dir)
    report = regular_file(work_dir / REPORT_FILE, work_dir)
    artifact_sha256 = lease.hold_while(partial(sha256_of, artifact), go_on)
    verified_sha256 = verified.result.get("artifact_sha256", artifact_sha256)
    if verified_sha256 != artifact_sha256:
        return failed(
            ErrorCode.VERIFICATION_FAILED,
            f"expected the file that was verified ({verified_sha256}); found another one to store ({artifact_sha256})",
        )
    summary = ResultSummary.model_validate(verified.result.get("summary"))
    stored_artifact = lease.hold_while(partial(blobs.put_content, artifact, move=True), go_on)
    stored_report = lease.hold_while(partial(blobs.put_content, report, move=True), go_on)
    mark("artifact_put")
    mark("before_finish")
    lease.write(partial(_succeed, claim, blobs, stored_artifact, stored_report, summary))
    return verified


_Stored = tuple[str, str, int]  # key, SHA-256, bytes


def _succeed(
    claim: Claim, blobs: BlobStore, artifact: _Stored, report: _Stored, summary: ResultSummary, session: Session
) -> bool:
    keys = (artifact[0], report[0])
    hold_blobs(session, keys)
    if not all(map(blobs.exists, keys)):
        raise BlobStoreAwayError("a sweep took old files of the same content at this very moment; they are stored anew")
    artifact_id = _insert(session, claim, artifact_name(session, claim.model.id), "torchscript", artifact)
    if artifact_id is None or _insert(session, claim, "report.json", "report", report) is None:
        return False
    result = summary.model_copy(update={"artifact_id": artifact_id, "artifact_sha256": artifact[1]})
    return finish_succeeded(session, claim.job_id, claim.epoch, result)


def _insert(session: Session, claim: Claim, name: str, file_format: str, stored: _Stored) -> str | None:
    key, sha256, size = stored
    return insert_artifact(
        session, claim.job_id, claim.epoch, name=name, format=file_format, blob_key=key, sha256=sha256, bytes=size
    )


def artifact_name(session: Session, model_id: str) -> str:
    """What the compressed file is called: after the model."""
    model = get_model(session, model_id, None)
    name = PurePath(model.name if model is not None and model.name else "model").name
    path = PurePath(name)
    return f"{path.stem if path.suffix in _MODEL_SUFFIXES else name}-compressed.pt"


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
