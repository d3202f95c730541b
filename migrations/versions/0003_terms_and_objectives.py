"""Terms of any type with their stored bits and details, and jobs whose loss is an uploaded module."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0003"
down_revision: str | None = "0002"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

_REFERENCE = "fk_jobs_objective_model_id_models"


def upgrade() -> None:
    table = "rank_configurations"
    op.add_column(table, sa.Column("type", sa.String(length=40), nullable=False, server_default="low_rank"))
    op.add_column(table, sa.Column("bits", sa.BigInteger(), nullable=False, server_default="0"))
    op.add_column(table, sa.Column("details", sa.JSON(none_as_null=True), nullable=False, server_default="{}"))
    op.execute("UPDATE rank_configurations SET type = 'dense' WHERE form = 'dense'")
    op.execute(  # reasons that are given no more
        "UPDATE rank_configurations SET reason = 'UNSUPPORTED_KIND' "
        "WHERE reason IN ('GROUPED_CONVOLUTION', 'PADDING_MODE')"
    )
    _set_rank_type(sa.Integer(), sa.BigInteger())  # units may be kept weights, which are many
    _add_objective()
    op.create_index(op.f("ix_jobs_objective_model_id"), "jobs", ["objective_model_id"])


def downgrade() -> None:
    op.drop_index(op.f("ix_jobs_objective_model_id"), table_name="jobs")
    op.execute("ALTER TABLE jobs DROP COLUMN objective_model_id")
    op.execute("UPDATE rank_configurations SET rank = 2147483647 WHERE rank > 2147483647")
    _set_rank_type(sa.BigInteger(), sa.Integer())
    for column in ("details", "bits", "type"):
        op.execute(f"ALTER TABLE rank_configurations DROP COLUMN {column}")


def _add_objective() -> None:
    # Jobs are never made anew, which on SQLite would delete what refers to them; there the column says it all.
    if op.get_bind().dialect.name == "sqlite":
        op.execute(
            f"ALTER TABLE jobs ADD COLUMN objective_model_id VARCHAR(40) CONSTRAINT {_REFERENCE} REFERENCES models (id)"
        )
        return
    op.add_column("jobs", sa.Column("objective_model_id", sa.String(length=40), nullable=True))
    op.create_foreign_key(op.f(_REFERENCE), "jobs", "models", ["objective_model_id"], ["id"])


def _set_rank_type(before: sa.types.TypeEngine[int], after: sa.types.TypeEngine[int]) -> None:
    with op.batch_alter_table("rank_configurations") as batch:
        batch.alter_column("rank", type_=after, existing_type=before, existing_nullable=True)
