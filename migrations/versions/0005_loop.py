"""the loop: serving periods, corrections, learning runs, gate reports, shadow runs, review tasks

Revision 0005, after 0004.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

import storage.records

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "gate_reports",
        sa.Column("report_id", sa.Integer(), autoincrement=True, nullable=False),
        sa.Column("model_name", sa.String(length=128), nullable=False),
        sa.Column("model_version", sa.String(length=32), nullable=False),
        sa.Column("champion_version", sa.String(length=32), nullable=True),
        sa.Column("weights_digest", sa.String(length=64), nullable=False),
        sa.Column("plan_digest", sa.String(length=64), nullable=False),
        sa.Column("change", sa.String(length=16), nullable=False),
        sa.Column("requested_by", sa.String(length=128), nullable=False),
        sa.Column("examined_at", storage.records.UtcDateTime(timezone=True), nullable=False),
        sa.Column("verdict", sa.String(length=16), nullable=False),
        sa.Column("report", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("report_id"),
    )
    with op.batch_alter_table("gate_reports") as batch_op:
        batch_op.create_index(op.f("ix_gate_reports_model_name"), ["model_name"], unique=False)
    op.create_table(
        "learning_runs",
        sa.Column("run_id", sa.String(length=40), nullable=False),
        sa.Column("model_name", sa.String(length=128), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("base_version", sa.String(length=32), nullable=False),
        sa.Column("semver", sa.String(length=32), nullable=True),
        sa.Column("requested_by", sa.String(length=128), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("state_reason", sa.Text(), nullable=True),
        sa.Column("cases", sa.JSON(), nullable=True),
        sa.Column("folder", sa.Text(), nullable=True),
        sa.Column("requested_at", storage.records.UtcDateTime(timezone=True), nullable=False),
        sa.Column("updated_at", storage.records.UtcDateTime(timezone=True), nullable=False),
        sa.Column("workflow_id", sa.String(length=128), nullable=False),
        sa.Column("figures", sa.JSON(), nullable=True),
        sa.PrimaryKeyConstraint("run_id"),
        sa.UniqueConstraint("workflow_id"),
    )
    with op.batch_alter_table("learning_runs") as batch_op:
        batch_op.create_index(op.f("ix_learning_runs_model_name"), ["model_name"], unique=False)
        batch_op.create_index(op.f("ix_learning_runs_state"), ["state"], unique=False)
    op.create_table(
        "model_pauses",
        sa.Column("model_name", sa.String(length=128), nullable=False),
        sa.Column("since", storage.records.UtcDateTime(timezone=True), nullable=False),
        sa.Column("by", sa.String(length=128), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("model_name"),
    )
    op.create_table(
        "review_tasks",
        sa.Column("task_id", sa.Integer(), autoincrement=True, nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("model_name", sa.String(length=128), nullable=False),
        sa.Column("model_version", sa.String(length=32), nullable=False),
        sa.Column("subject", sa.String(length=160), nullable=False),
        sa.Column("summary", sa.Text(), nullable=False),
        sa.Column("result_ids", sa.JSON(), nullable=False),
        sa.Column("picture", sa.Text(), nullable=True),
        sa.Column("opened_at", storage.records.UtcDateTime(timezone=True), nullable=False),
        sa.Column("closed_at", storage.records.UtcDateTime(timezone=True), nullable=True),
        sa.Column("closed_by", sa.String(length=128), nullable=True),
        sa.Column("outcome", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("task_id"),
    )
    with op.batch_alter_table("review_tasks") as batch_op:
        batch_op.create_index(op.f("ix_review_tasks_model_name"), ["model_name"], unique=False)
    op.create_table(
        "serving_periods",
        sa.Column("period_id", sa.Integer(), autoincrement=True, nullable=False),
        sa.Column("model_name", sa.String(length=128), nullable=False),
        sa.Column("model_version", sa.String(length=32), nullable=False),
        sa.Column("weights_digest", sa.String(length=64), nullable=False),
        sa.Column("previous_version", sa.String(length=32), nullable=True),
        sa.Column("began_at", storage.records.UtcDateTime(timezone=True), nullable=False),
        sa.Column("began_by", sa.String(length=128), nullable=False),
        sa.Column("watched_until", storage.records.UtcDateTime(timezone=True), nullable=True),
        sa.Column("ended_at", storage.records.UtcDateTime(timezone=True), nullable=True),
        sa.Column("ended_why", sa.Text(), nullable=True),
        sa.Column("rolled_back", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("period_id"),
    )
    with op.batch_alter_table("serving_periods") as batch_op:
        batch_op.create_index("ix_serving_periods_open", ["model_name", "ended_at"], unique=False)
    op.create_table(
        "corrections",
        sa.Column("correction_id", sa.Integer(), autoincrement=True, nullable=False),
        sa.Column("result_id", sa.String(length=40), nullable=False),
        sa.Column("model_name", sa.String(length=128), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("by", sa.String(length=128), nullable=False),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("recorded_at", storage.records.UtcDateTime(timezone=True), nullable=False),
        sa.Column("labels_path", sa.Text(), nullable=True),
        sa.Column("labels_digest", sa.String(length=64), nullable=True),
        sa.Column("dice", sa.JSON(), nullable=True),
        sa.Column("seconds", sa.Integer(), nullable=True),
        sa.Column("learnt_by", sa.String(length=40), nullable=True),
        sa.ForeignKeyConstraint(
            ["result_id"],
            ["results.result_id"],
        ),
        sa.PrimaryKeyConstraint("correction_id"),
    )
    with op.batch_alter_table("corrections") as batch_op:
        batch_op.create_index(op.f("ix_corrections_model_name"), ["model_name"], unique=False)
        batch_op.create_index(op.f("ix_corrections_result_id"), ["result_id"], unique=False)
    op.create_table(
        "shadow_runs",
        sa.Column("shadow_id", sa.Integer(), autoincrement=True, nullable=False),
        sa.Column("result_id", sa.String(length=40), nullable=False),
        sa.Column("model_name", sa.String(length=128), nullable=False),
        sa.Column("model_version", sa.String(length=32), nullable=False),
        sa.Column("workflow_id", sa.String(length=128), nullable=False),
        sa.Column("ordered_at", storage.records.UtcDateTime(timezone=True), nullable=False),
        sa.Column("finished_at", storage.records.UtcDateTime(timezone=True), nullable=True),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("state_reason", sa.Text(), nullable=True),
        sa.Column("verdict", sa.String(length=16), nullable=True),
        sa.Column("dice", sa.JSON(), nullable=True),
        sa.Column("figures", sa.JSON(), nullable=True),
        sa.ForeignKeyConstraint(
            ["result_id"],
            ["results.result_id"],
        ),
        sa.PrimaryKeyConstraint("shadow_id"),
        sa.UniqueConstraint("result_id", "model_version"),
        sa.UniqueConstraint("workflow_id"),
    )
    with op.batch_alter_table("shadow_runs") as batch_op:
        batch_op.create_index(op.f("ix_shadow_runs_result_id"), ["result_id"], unique=False)


def downgrade() -> None:
    op.drop_table("shadow_runs")
    op.drop_table("corrections")
    op.drop_table("serving_periods")
    op.drop_table("review_tasks")
    op.drop_table("model_pauses")
    op.drop_table("learning_runs")
    op.drop_table("gate_reports")
