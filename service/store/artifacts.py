"""The files that jobs produced."""

from sqlalchemy import delete, insert, select
from sqlalchemy.orm import Session

from service.contract.ids import ARTIFACT, new_id
from service.contract.resources import ArtifactResource
from service.store.fence import hold_lease
from service.store.tables import Artifact, Job


def insert_artifact(
    session: Session,
    job_id: str,
    epoch: int,
    *,
    name: str,
    format: str,  # noqa: A002
    blob_key: str,
    sha256: str,
    bytes: int,  # noqa: A002
) -> str | None:
    """Make a stored file an artifact of the job and return its id; None when the lease is lost.

    A file of the same name from an earlier attempt is replaced.
    """
    if not hold_lease(session, job_id, epoch):
        return None
    session.execute(delete(Artifact).where(Artifact.job_id == job_id, Artifact.name == name))
    artifact_id = new_id(ARTIFACT)
    session.execute(
        insert(Artifact).values(
            id=artifact_id,
            job_id=job_id,
            epoch=epoch,
            name=name,
            format=format,
            blob_key=blob_key,
            sha256=sha256,
            bytes=bytes,
        )
    )
    return artifact_id


def list_artifacts(session: Session, job_id: str) -> list[Artifact]:
    """The job's files, in the order in which they were made."""
    return list(session.scalars(select(Artifact).where(Artifact.job_id == job_id).order_by(Artifact.id)))


def get_artifact(session: Session, artifact_id: str, owner: str | None) -> Artifact | None:
    """The artifact's row, if its job is the owner's; `owner=None` reads for the service itself."""
    query = select(Artifact).where(Artifact.id == artifact_id)
    if owner is not None:
        query = query.join(Job, Job.id == Artifact.job_id).where(Job.owner == owner)
    return session.scalars(query).one_or_none()


def artifact_resource(row: Artifact) -> ArtifactResource:
    """The artifact as it stands on the wire."""
    return ArtifactResource(id=row.id, name=row.name, format=row.format, bytes=row.bytes, sha256=row.sha256)
