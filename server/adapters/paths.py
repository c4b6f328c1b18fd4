"""The paths of the administration of adapters, which balancers know too."""

from __future__ import annotations

ADMIN_PATHS = (
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
    "/v1/lora_adapters",
    "/v1/lora_adapters/{name}",
    "/v1/lora_adapters/{name}/versions",
    "/v1/lora_adapters/{name}/rollback",
    "/v1/lora_adapters/{name}/prefetch",
)
