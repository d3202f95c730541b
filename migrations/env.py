"""Runs the migrations on the connection that `service.store.migration` hands over."""

from alembic import context

from service.store.tables import Base

connection = context.config.attributes.get("connection")
if connection is None:
    raise RuntimeError("expected a connection from service.store.migration; run `rankpress migrate`")

context.configure(
    connection=connection,
    target_metadata=Base.metadata,
    render_as_batch=True,
    transactional_ddl=True,  # both databases take back a half-done change of the schema
    compare_type=True,
)
with context.begin_transaction():
    context.run_migrations()
