"""Alembic's entry point: runs the migrations on the connection that `Database.migrate` hands over.

The caller has begun the transaction and holds the registry's writer lock, so two nodes that start together on a new
database do not both create it.
"""

from alembic import context

from xca_imaging.registry.tables import Base

context.configure(connection=context.config.attributes["connection"], target_metadata=Base.metadata)
with context.begin_transaction():
    context.run_migrations()
