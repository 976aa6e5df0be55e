"""Keeps the answers on a requestor's association for the one who asked.

pynetdicom's background thread of an association takes waiting messages off the queue unless it is paused, and the
pause that its `send_*` methods ask for can come too late: they take "about to pause" for "paused" and send, the
thread finishes its round and throws the answer away as "unexpected". The caller then waits for its whole timeout for
an answer that has come. An association on which we only ask has nothing for that thread to serve.
"""

from __future__ import annotations

from typing import Any

from pynetdicom.association import Association


def keep_answers(association: Association) -> Association:
    """Let only a caller that waits (`send_c_store`, `send_c_find`, …) take messages; call before the first request."""
    take = association.dimse.get_msg

    def take_when_waited_for(block: bool = False) -> tuple[Any, Any]:
        return take(block=True) if block else (None, None)

    association.dimse.get_msg = take_when_waited_for
    return association
