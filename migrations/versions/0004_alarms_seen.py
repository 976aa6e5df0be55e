"""alarms that somebody has taken on

Revision 0004, after 0003.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

import storage.records

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("alarms") as table:
        table.add_column(sa.Column("seen_at", storage.records.UtcDateTime(timezone=True), nullable=True))
        table.add_column(sa.Column("seen_by", sa.String(length=128), nullable=True))
        table.add_column(sa.Column("seen_reason", sa.Text(), nullable=True))
        table.add_column(sa.Column("quiet_until", storage.records.UtcDateTime(timezone=True), nullable=True))


def downgrade() -> None:
    with op.batch_alter_table("alarms") as table:
        for name in ("quiet_until", "seen_reason", "seen_by", "seen_at"):
            table.drop_column(name)
