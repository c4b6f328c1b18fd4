"""The server's TLS certificate."""

from __future__ import annotations

import ssl
from pathlib import Path


def tls_context(certificate: Path | None, key: Path | None) -> ssl.SSLContext | None:
    """A context for TLS 1.2 or newer; None without a certificate.

    certificate: PEM file, with its chain.
    key: PEM file; None if the key is in the certificate's file.

    Raises ValueError if they cannot be read or do not belong together.
    """
    if certificate is None:
        if key is not None:
            raise ValueError("--ssl-keyfile goes with --ssl-certfile")
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        # Without this, OpenSSL would prompt for a passphrase, and a service would hang there.
        context.load_cert_chain(certificate, key, password=lambda: "")
    except (OSError, ValueError) as error:
        where = str(certificate) if key is None else f"{certificate} and {key}"
        raise ValueError(
            f"--ssl-certfile: no certificate with its unencrypted key in {where}: {error}"
        ) from error
    return context
