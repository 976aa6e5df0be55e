"""deletions of studies, legal holds, facts that outlive a study

Revision 0007, after 0006.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

import storage.records

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "study_deletions",
        sa.Column("deletion_id", sa.String(length=32), nullable=False),
        sa.Column("study_key", sa.String(length=32), nullable=False),
        sa.Column("study_instance_uid", sa.String(length=64), nullable=True),
        sa.Column("why", sa.String(length=16), nullable=False),
        sa.Column("by", sa.String(length=128), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("in_spite_of", sa.JSON(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("asked_at", storage.records.UtcDateTime(timezone=True), nullable=False),
        sa.Column("done_at", storage.records.UtcDateTime(timezone=True), nullable=True),
        sa.Column("objects", sa.Integer(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("object_tails", sa.LargeBinary(), nullable=False),
        sa.Column("result_ids", sa.JSON(), nullable=True),
        sa.Column("workflow_ids", sa.JSON(), nullable=True),
        sa.PrimaryKeyConstraint("deletion_id"),
    )
    with op.batch_alter_table("study_deletions") as batch_op:
        batch_op.create_index(batch_op.f("ix_study_deletions_state"), ["state"], unique=False)
        batch_op.create_index(batch_op.f("ix_study_deletions_study_key"), ["study_key"], unique=False)
    op.create_table(
        "legal_holds",
        sa.Column("study_instance_uid", sa.String(length=64), nullable=False),
        sa.Column("since", storage.records.UtcDateTime(timezone=True), nullable=False),
        sa.Column("by", sa.String(length=128), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["study_instance_uid"], ["studies.study_instance_uid"]),
        sa.PrimaryKeyConstraint("study_instance_uid"),
    )
    op.create_table(
        "past_facts",
        sa.Column("facts_id", sa.String(length=40), nullable=False),
        sa.Column("model_name", sa.String(length=128), nullable=False),
        sa.Column("model_version", sa.String(length=32), nullable=False),
        sa.Column("scanner", sa.String(length=128), nullable=False),
        sa.Column("recorded_at", storage.records.UtcDateTime(timezone=True), nullable=False),
        sa.Column("acquisition", sa.JSON(), nullable=False),
        sa.Column("image", sa.JSON(), nullable=True),
        sa.Column("measurements", sa.JSON(), nullable=True),
        sa.Column("mean_confidence", sa.Float(), nullable=True),
        sa.Column("verdict", sa.String(length=16), nullable=False),
        sa.PrimaryKeyConstraint("facts_id"),
    )
    with op.batch_alter_table("past_facts") as batch_op:
        batch_op.create_index("ix_past_facts_model", ["model_name", "model_version", "recorded_at"], unique=False)


def downgrade() -> None:
    op.drop_table("past_facts")
    op.drop_table("legal_holds")
    op.drop_table("study_deletions")
