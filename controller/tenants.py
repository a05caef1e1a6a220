"""The tenants of a configuration: who a call is from, and how much each may use at a time."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from ..common.api_keys import KeyRing
from ..common.config import TenantConfig
from ..common.errors import Unauthenticated
from ..common.tenants import ANONYMOUS, ANONYMOUS_NAME, Tenant
from ..scheduler.tenant_limits import TenantLimits

logger = logging.getLogger(__name__)


class Tenants:
    """See the module's docstring. Without keys in the configuration every caller is the tenant `anonymous`."""

    def __init__(self, config: Mapping[str, TenantConfig]) -> None:
        self._keys = KeyRing({name: tenant.keys for name, tenant in config.items()})
        self._tenants = {name: Tenant(name, tenant.weight) for name, tenant in config.items()}
        self._tenants.setdefault(ANONYMOUS_NAME, ANONYMOUS)
        self._limits = {
            name: TenantLimits(name, max_requests=None, max_tokens_per_minute=None)
            if name not in config
            else TenantLimits(
                name, max_requests=config[name].max_requests, max_tokens_per_minute=config[name].max_tokens_per_minute
            )
            for name in self._tenants
        }

    def authenticate(self, authorization: str | None) -> Tenant:
        """Whose call it is, by its `authorization` header or metadata.

        Raises:
            Unauthenticated: keys are configured and there is none, or one that is not among them.
        """
        if not len(self._keys):
            return self._tenants[ANONYMOUS_NAME]
        if not authorization:
            raise Unauthenticated(
                "an API key is needed: send 'authorization: Bearer KEY' (the SDK's api_key= or PILOTFISH_API_KEY)"
            )
        scheme, _, key = authorization.partition(" ")
        owner = self._keys.owner(key.strip()) if scheme.lower() == "bearer" else None
        if owner is None:
            raise Unauthenticated("the API key is not valid here: 'authorization: Bearer KEY' needs one of this server's keys")
        return self._tenants[owner]

    def named(self, name: str) -> Tenant:
        """Of a name that an earlier controller knew; one that is not configured any more stands for `anonymous`."""
        if name not in self._tenants:
            logger.warning("the tenant %r is not configured any more: its requests are taken for %s's", name, ANONYMOUS_NAME)
        return self._tenants.get(name, self._tenants[ANONYMOUS_NAME])

    def limits(self, tenant: Tenant) -> TenantLimits:
        return self._limits[tenant.name]
