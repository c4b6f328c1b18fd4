"""For schemathesis: requests about the model that is served, so that they come to be answered."""

from __future__ import annotations

from typing import Any

import schemathesis


@schemathesis.hook
def map_body(context: Any, body: Any) -> Any:
    if isinstance(body, dict):
        if isinstance(body.get("model"), str) and body["model"]:
            body["model"] = "tiny"
        if isinstance(body.get("adapter"), str):
            del body["adapter"]  # there is none
        if isinstance(body.get("timeout"), int | float) and body["timeout"] > 0:
            body["timeout"] = 1000  # else it may pass, which is answered 504
    return body


@schemathesis.hook
def map_path_parameters(context: Any, path_parameters: Any) -> Any:
    if path_parameters and len(str(path_parameters.get("model", ""))) > 3:
        path_parameters["model"] = "tiny"
    return path_parameters
