"""The certificate a server shows."""

from __future__ import annotations

import ssl
from pathlib import Path


def tls_context(certificate: Path, key: Path | None) -> ssl.SSLContext:
    """TLS 1.2 or newer. certificate: PEM, with its chain; key: PEM, if it is not in that file.

    Raises ValueError where they cannot be read or do not belong together.
    """
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        # Asking for a passphrase would stop a service at its start.
        context.load_cert_chain(certificate, key, password=lambda: "")
    except (OSError, ValueError) as error:
        where = str(certificate) if key is None else f"{certificate} and {key}"
        raise ValueError(
            f"--ssl-certfile: no certificate with its unencrypted key in {where}: {error}"
        ) from error
    return context
