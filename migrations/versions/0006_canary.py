"""canary studies

Revision 0006, after 0005.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

import storage.records

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "canary_runs",
        sa.Column("study_instance_uid", sa.String(length=64), nullable=False),
        sa.Column("model_name", sa.String(length=128), nullable=False),
        sa.Column("model_version", sa.String(length=32), nullable=False),
        sa.Column("case_name", sa.String(length=64), nullable=False),
        sa.Column("calling_ae", sa.String(length=16), nullable=False),
        sa.Column("address", sa.String(length=64), nullable=False),
        sa.Column("started_at", storage.records.UtcDateTime(timezone=True), nullable=False),
        sa.Column("due_at", storage.records.UtcDateTime(timezone=True), nullable=False),
        sa.Column("sent_at", storage.records.UtcDateTime(timezone=True), nullable=True),
        sa.Column("judged_at", storage.records.UtcDateTime(timezone=True), nullable=True),
        sa.Column("outcome", sa.String(length=8), nullable=True),
        sa.Column("detail", sa.Text(), nullable=True),
        sa.Column("seconds", sa.Float(), nullable=True),
        sa.Column("dice", sa.JSON(), nullable=True),
        sa.Column("removed_at", storage.records.UtcDateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("study_instance_uid"),
    )
    with op.batch_alter_table("canary_runs") as batch_op:
        batch_op.create_index("ix_canary_runs_model", ["model_name", "started_at"], unique=False)


def downgrade() -> None:
    op.drop_table("canary_runs")
