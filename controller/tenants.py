"""The tenants of a configuration: who a call is from, what it may see, and how much each may use at a time."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from ..common.api_keys import KeyRing
from ..common.config import TenantConfig
from ..common.errors import PermissionDenied, Unauthenticated
from ..common.tenants import ANONYMOUS, ANONYMOUS_NAME, Tenant
from ..scheduler.tenant_limits import TenantLimits

logger = logging.getLogger(__name__)


class Tenants:
    """See the module's docstring. Without keys in the configuration every caller is the tenant `anonymous`, and an operator.

    `isolate_cache` is for all tenants; else it is each one's own.
    """

    def __init__(self, config: Mapping[str, TenantConfig], *, isolate_cache: bool = False) -> None:
        self._keys = KeyRing({name: tenant.keys for name, tenant in config.items()})
        self._tenants = {name: Tenant(name, tenant.weight) for name, tenant in config.items()}
        self._tenants.setdefault(ANONYMOUS_NAME, ANONYMOUS)
        self._operators = {name for name, tenant in config.items() if tenant.operator or not tenant.keys}
        self._isolated = {name for name in self._tenants if isolate_cache or (name in config and config[name].isolate_cache)}
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

    @property
    def have_keys(self) -> bool:
        return bool(len(self._keys))

    def is_operator(self, tenant: Tenant) -> bool:
        """Whether it may see what concerns all tenants."""
        return not self.have_keys or tenant.name in self._operators

    def check_operator(self, tenant: Tenant) -> None:
        """Raises PermissionDenied: it is not an operator."""
        if not self.is_operator(tenant):
            raise PermissionDenied(
                f"the key of {tenant.name} may not see the whole cluster: that takes a key of a tenant with operator = true in "
                "the server's configuration (`pilotfish keys new NAME --operator` makes one)"
            )

    def cache_salt(self, tenant: Tenant) -> bytes:
        """Of its prompts' block hashes: equal prompts of two tenants meet in a prefix cache where neither is isolated."""
        return f"tenant {tenant.name}".encode() if tenant.name in self._isolated else b""

    def named(self, name: str) -> Tenant:
        """Of a name that an earlier controller knew; one that is not configured any more stands for `anonymous`."""
        if name not in self._tenants:
            logger.warning("the tenant %r is not configured any more: its requests are taken for %s's", name, ANONYMOUS_NAME)
        return self._tenants.get(name, self._tenants[ANONYMOUS_NAME])

    def limits(self, tenant: Tenant) -> TenantLimits:
        return self._limits[tenant.name]
