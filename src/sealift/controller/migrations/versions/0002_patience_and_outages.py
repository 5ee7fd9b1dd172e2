"""How long a broken link is waited for, what outages there were, and when each step of setting up was done."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

# What earlier migrations had; a revision never changes, so the figures are written out here.
_COLUMNS = (
    ("give_up_ms", sa.Integer(), "60000"),
    ("switchover_timeout_ms", sa.Integer(), "5000"),
    ("outages", sa.Integer(), "0"),
    ("longest_outage_ms", sa.Integer(), "0"),
    ("reconnects", sa.Integer(), "0"),
    ("outage_events", sa.Integer(), "0"),
    ("timeline", sa.JSON(), "[]"),
)


def upgrade() -> None:
    for name, kind, before in _COLUMNS:
        op.add_column("migrations", sa.Column(name, kind, nullable=False, server_default=before))
    op.add_column("events", sa.Column("slug", sa.String(length=64), nullable=True))


def downgrade() -> None:
    op.drop_column("events", "slug")
    for name, _, _ in reversed(_COLUMNS):
        op.drop_column("migrations", name)
