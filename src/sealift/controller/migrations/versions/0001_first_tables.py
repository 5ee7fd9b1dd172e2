"""The first tables."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "events",
        sa.Column("seq", sa.Integer(), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.Column("type", sa.String(length=64), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.Column("host", sa.String(length=63), nullable=True),
        sa.Column("vm", sa.String(length=63), nullable=True),
        sa.Column("migration", sa.Uuid(), nullable=True),
        sa.Column("state", sa.String(length=16), nullable=True),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_events")),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "hosts",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("address", sa.String(length=300), nullable=False),
        sa.Column("migration_address", sa.String(length=300), nullable=False),
        sa.Column("public_key", sa.LargeBinary(), nullable=False),
        sa.Column("joined_at", sa.Double(), nullable=False),
        sa.Column("was_capable", sa.Boolean(), nullable=False),
        sa.Column("lost_at", sa.Double(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_hosts")),
        sa.UniqueConstraint("name", name=op.f("uq_hosts_name")),
    )
    op.create_table(
        "migrations",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("vm", sa.Uuid(), nullable=False),
        sa.Column("vm_name", sa.String(length=63), nullable=False),
        sa.Column("source", sa.Uuid(), nullable=False),
        sa.Column("source_name", sa.String(length=63), nullable=False),
        sa.Column("target", sa.Uuid(), nullable=False),
        sa.Column("target_name", sa.String(length=63), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("asked_policy", sa.String(length=16), nullable=False),
        sa.Column("protection", sa.String(length=8), nullable=True),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("cipher", sa.String(length=32), nullable=True),
        sa.Column("channels", sa.Integer(), nullable=False),
        sa.Column("bandwidth", sa.BigInteger(), nullable=False),
        sa.Column("max_downtime_ms", sa.Integer(), nullable=False),
        sa.Column("attempt", sa.Uuid(), nullable=True),
        sa.Column("fence", sa.Integer(), nullable=True),
        sa.Column("sealed_out", sa.BigInteger(), nullable=False),
        sa.Column("sealed_in", sa.BigInteger(), nullable=False),
        sa.Column("target_sealed_out", sa.BigInteger(), nullable=False),
        sa.Column("target_sealed_in", sa.BigInteger(), nullable=False),
        sa.Column("phases", sa.JSON(), nullable=False),
        sa.Column("findings", sa.JSON(), nullable=False),
        sa.Column("downtime_ms", sa.Double(), nullable=True),
        sa.Column("requested_by", sa.String(length=63), nullable=False),
        sa.Column("cancel_requested", sa.Boolean(), nullable=False),
        sa.Column("error_slug", sa.String(length=64), nullable=False),
        sa.Column("error", sa.Text(), nullable=False),
        sa.Column("todo", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("finished_at", sa.Double(), nullable=True),
        sa.Column("tidied", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_migrations")),
    )
    with op.batch_alter_table("migrations", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_migrations_created_at"), ["created_at"], unique=False)
        batch_op.create_index(
            "uq_migrations_unfinished_vm",
            ["vm"],
            unique=True,
            sqlite_where=sa.text("finished_at IS NULL"),
            postgresql_where=sa.text("finished_at IS NULL"),
        )

    op.create_table(
        "tokens",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("digest", sa.LargeBinary(length=32), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("expires_at", sa.Double(), nullable=True),
        sa.Column("replaces", sa.String(length=63), nullable=True),
        sa.Column("used_at", sa.Double(), nullable=True),
        sa.Column("used_key", sa.LargeBinary(), nullable=True),
        sa.Column("host", sa.Uuid(), nullable=True),
        sa.Column("certificate", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_tokens")),
        sa.UniqueConstraint("digest", name=op.f("uq_tokens_digest")),
    )
    op.create_table(
        "vms",
        sa.Column("uuid", sa.Uuid(), nullable=False),
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("host", sa.Uuid(), nullable=False),
        sa.Column("migrate_encryption", sa.String(length=16), nullable=False),
        sa.Column("encrypted", sa.Boolean(), nullable=False),
        sa.Column("fence", sa.Integer(), nullable=False),
        sa.Column("config", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["host"], ["hosts.id"], name=op.f("fk_vms_host_hosts")),
        sa.PrimaryKeyConstraint("uuid", name=op.f("pk_vms")),
        sa.UniqueConstraint("name", name=op.f("uq_vms_name")),
    )


def downgrade() -> None:
    op.drop_table("vms")
    op.drop_table("tokens")
    with op.batch_alter_table("migrations", schema=None) as batch_op:
        batch_op.drop_index(
            "uq_migrations_unfinished_vm",
            sqlite_where=sa.text("finished_at IS NULL"),
            postgresql_where=sa.text("finished_at IS NULL"),
        )
        batch_op.drop_index(batch_op.f("ix_migrations_created_at"))

    op.drop_table("migrations")
    op.drop_table("hosts")
    op.drop_table("events")
