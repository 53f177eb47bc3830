"""From the secrets' events to the clients that asked for them."""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import UUID

from kvik.conf.secret import USAGE_TYPES
from kvik.daemon.subscriptions import Subscriptions
from kvik.manager.secrets import VALUE_CHANGED

if TYPE_CHECKING:
    from kvik.conf.secret import Secret
    from kvik.manager.secrets import Secrets

__all__ = ["SecretEvents", "reference"]

LIFECYCLE, VALUE = 0, 1  # virSecretEventID


def reference(secret: Secret) -> tuple[bytes, int, str]:
    """How the wire names a secret."""
    return (UUID(secret.uuid).bytes, USAGE_TYPES.index(secret.usage_type), secret.usage_id)


class SecretEvents(Subscriptions):
    def __init__(self, secrets: Secrets) -> None:
        super().__init__("secrets", (LIFECYCLE, VALUE))
        self._unsubscribe = secrets.subscribe(self._happened)

    def close(self) -> None:
        self._unsubscribe()

    def _happened(self, secret: Secret, event: int) -> None:
        named = reference(secret)
        if event == VALUE_CHANGED:
            self.send(named, named[0], VALUE, "SECRET_EVENT_VALUE_CHANGED")
        else:
            self.send(named, named[0], LIFECYCLE, "SECRET_EVENT_LIFECYCLE", event, 0)
