"""Queues by device, deadlines in the queue, retries, deletion, and counters over all machines."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

from service.store.time import UtcDateTime

revision: str = "0002"
down_revision: str | None = "0001"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

_TERMINAL = sa.text("finished_at IS NOT NULL")

# Tables that others refer to are never made anew, which on SQLite would delete what refers to them.
_ADDED = (
    ("attempts", "gpu"),
    ("jobs", "queue_expires_at"),
    ("jobs", "retry_of"),
    ("jobs", "min_gpu_memory_bytes"),
    ("jobs", "device"),
    ("datasets", "deleted_at"),
    ("models", "deleted_at"),
)


def _set_outcomes(outcomes: str) -> None:
    with op.batch_alter_table("attempts") as batch:
        batch.drop_constraint(op.f("ck_attempts_outcome"), type_="check")
        batch.create_check_constraint(op.f("ck_attempts_outcome"), f"outcome IS NULL OR outcome IN ({outcomes})")


def upgrade() -> None:
    op.create_table(
        "counters",
        sa.Column("name", sa.String(length=40), nullable=False),
        sa.Column("label", sa.String(length=40), nullable=False),
        sa.Column("value", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("name", "label", name=op.f("pk_counters")),
    )
    for table in ("models", "datasets"):
        op.add_column(table, sa.Column("deleted_at", UtcDateTime(), nullable=True))
    op.add_column("jobs", sa.Column("device", sa.String(length=10), nullable=False, server_default="auto"))
    op.add_column("jobs", sa.Column("min_gpu_memory_bytes", sa.BigInteger(), nullable=True))
    op.add_column("jobs", sa.Column("retry_of", sa.String(length=40), nullable=True))
    op.add_column("jobs", sa.Column("queue_expires_at", UtcDateTime(), nullable=True))
    op.execute("UPDATE jobs SET queue = 'cpu'")  # there was one queue, of whatever name
    op.create_index("ix_jobs_finished_at", "jobs", ["finished_at"], sqlite_where=_TERMINAL, postgresql_where=_TERMINAL)
    op.add_column("attempts", sa.Column("gpu", sa.Text(), nullable=True))
    _set_outcomes("'succeeded', 'failed', 'canceled', 'crashed', 'deferred', 'drained', 'lost'")
    op.drop_index("ix_checkpoints_job_id_epoch_step", table_name="checkpoints")
    with op.batch_alter_table("checkpoints") as batch:
        batch.alter_column(
            "step",
            new_column_name="position",
            type_=sa.BigInteger(),
            existing_type=sa.Integer(),
            existing_nullable=False,
        )
    op.create_index("ix_checkpoints_job_id_epoch_position", "checkpoints", ["job_id", "epoch", "position"])
    op.execute("DELETE FROM workers")  # every worker has stopped for the new schema, and registers at its start
    with op.batch_alter_table("workers") as batch:
        batch.drop_column("queue")
        batch.add_column(sa.Column("queues", sa.JSON(), nullable=False))
        batch.add_column(sa.Column("version", sa.String(length=40), nullable=False))


def downgrade() -> None:
    op.execute("DELETE FROM workers")
    with op.batch_alter_table("workers") as batch:
        batch.drop_column("version")
        batch.drop_column("queues")
        batch.add_column(sa.Column("queue", sa.Text(), nullable=False))
    op.drop_index("ix_checkpoints_job_id_epoch_position", table_name="checkpoints")
    with op.batch_alter_table("checkpoints") as batch:
        batch.alter_column(
            "position",
            new_column_name="step",
            type_=sa.Integer(),
            existing_type=sa.BigInteger(),
            existing_nullable=False,
        )
    op.create_index("ix_checkpoints_job_id_epoch_step", "checkpoints", ["job_id", "epoch", "step"])
    op.drop_index("ix_jobs_finished_at", table_name="jobs")
    op.execute("UPDATE jobs SET queue = 'rankpress'")
    op.execute("UPDATE attempts SET outcome = 'crashed' WHERE outcome = 'deferred'")
    _set_outcomes("'succeeded', 'failed', 'canceled', 'crashed', 'drained', 'lost'")
    for table, column in _ADDED:
        op.execute(f"ALTER TABLE {table} DROP COLUMN {column}")
    op.drop_table("counters")
