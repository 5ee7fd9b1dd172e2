"""Key providers, what encrypts a VM, conversions of its disks, and settings."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("vms", sa.Column("provider", sa.String(length=63), nullable=True))
    op.add_column("vms", sa.Column("key_id", sa.String(length=128), nullable=True))
    op.add_column("vms", sa.Column("generation", sa.Integer(), nullable=False, server_default="0"))
    op.add_column("vms", sa.Column("config_file", sa.LargeBinary(), nullable=True))
    op.add_column("vms", sa.Column("setting_before", sa.String(length=16), nullable=True))
    op.add_column("vms", sa.Column("lock_reason", sa.Text(), nullable=False, server_default=""))
    op.create_index("ix_vms_provider", "vms", ["provider"])
    op.create_table(
        "key_providers",
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("members", sa.JSON(), nullable=False),
        sa.Column("is_default", sa.Boolean(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("exported_at", sa.Double(), nullable=True),
        sa.PrimaryKeyConstraint("name", name="pk_key_providers"),
    )
    op.create_table(
        "settings",
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("value", sa.String(length=200), nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_settings"),
    )
    op.create_table(
        "conversions",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("vm", sa.Uuid(), nullable=False),
        sa.Column("vm_name", sa.String(length=63), nullable=False),
        sa.Column("host", sa.Uuid(), nullable=False),
        sa.Column("host_name", sa.String(length=63), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("deep", sa.Boolean(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("verify", sa.String(length=8), nullable=False),
        sa.Column("done_bytes", sa.BigInteger(), nullable=False),
        sa.Column("total_bytes", sa.BigInteger(), nullable=False),
        sa.Column("provider", sa.String(length=63), nullable=False),
        sa.Column("key_id", sa.String(length=128), nullable=False),
        sa.Column("old_provider", sa.String(length=63), nullable=False),
        sa.Column("old_key_id", sa.String(length=128), nullable=False),
        sa.Column("after_config", sa.JSON(), nullable=False),
        sa.Column("after_file", sa.LargeBinary(), nullable=False),
        sa.Column("fence", sa.Integer(), nullable=False),
        sa.Column("with_vm", sa.Boolean(), nullable=False),
        sa.Column("findings", sa.JSON(), nullable=False),
        sa.Column("cancel_requested", sa.Boolean(), nullable=False),
        sa.Column("error_slug", sa.String(length=64), nullable=False),
        sa.Column("error", sa.Text(), nullable=False),
        sa.Column("todo", sa.Text(), nullable=False),
        sa.Column("requested_by", sa.String(length=63), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("finished_at", sa.Double(), nullable=True),
        sa.Column("key_unused", sa.Boolean(), nullable=False),
        sa.Column("tidied", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_conversions"),
    )
    op.create_index("ix_conversions_created_at", "conversions", ["created_at"])
    op.create_index(
        "uq_conversions_one_per_vm",
        "conversions",
        ["vm"],
        unique=True,
        sqlite_where=sa.text("finished_at IS NULL"),
        postgresql_where=sa.text("finished_at IS NULL"),
    )


def downgrade() -> None:
    op.drop_table("conversions")
    op.drop_table("settings")
    op.drop_table("key_providers")
    op.drop_index("ix_vms_provider", "vms")
    for name in ("lock_reason", "setting_before", "config_file", "generation", "key_id", "provider"):
        op.drop_column("vms", name)
