"""facts of studies, for drift

Revision 0003, after 0002.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

import storage.records

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "study_facts",
        sa.Column("result_id", sa.String(length=40), nullable=False),
        sa.Column("model_name", sa.String(length=128), nullable=False),
        sa.Column("model_version", sa.String(length=32), nullable=False),
        sa.Column("scanner", sa.String(length=128), nullable=False),
        sa.Column("recorded_at", storage.records.UtcDateTime(timezone=True), nullable=False),
        sa.Column("acquisition", sa.JSON(), nullable=False),
        sa.Column("image", sa.JSON(), nullable=True),
        sa.ForeignKeyConstraint(["result_id"], ["results.result_id"]),
        sa.PrimaryKeyConstraint("result_id"),
    )
    with op.batch_alter_table("study_facts") as table:
        table.create_index("ix_study_facts_model", ["model_name", "model_version", "recorded_at"], unique=False)


def downgrade() -> None:
    op.drop_table("study_facts")
