"""Keys that are being made and that no record names yet."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "fresh_keys",
        sa.Column("label", sa.String(length=128), nullable=False),
        sa.Column("provider", sa.String(length=63), nullable=False),
        sa.Column("vm_name", sa.String(length=63), nullable=False),
        sa.PrimaryKeyConstraint("label", name="pk_fresh_keys"),
    )


def downgrade() -> None:
    op.drop_table("fresh_keys")
