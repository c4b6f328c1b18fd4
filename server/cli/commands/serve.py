"""``nybble serve``: an OpenAI-compatible server."""

from __future__ import annotations

import gc

from nybble.server.cli.errors import end_at_once, expected_errors, interruptible, on_stderr
from nybble.server.cli.model_path import require_named
from nybble.server.cli.options_command import takes
from nybble.server.cli.threads import use_threads
from nybble.server.lifecycle.options import ServeOptions
from nybble.server.observability import logs

_ENGINE_FAILED = 70  # EX_SOFTWARE; 1 is for bad options


@takes(ServeOptions, positional="model")
def serve(options: ServeOptions) -> None:
    """Serve a model on http://HOST:PORT/v1.

    nybble serve demo --api-key secret
    """
    logs.configure(options.operation.log_level, options.operation.log_format)
    report = logs.error if options.operation.log_format == "json" else on_stderr
    with expected_errors(report), interruptible():
        use_threads(options.model.threads)
        from nybble.server.http.listen import bind, bind_unix
        from nybble.server.http.tls import tls_context

        # Before anything heavy is imported: a wrong path, a certificate that cannot be used and a
        # taken port are found out at once.
        require_named(options)
        network = options.network
        tls_context(network.ssl_certfile, network.ssl_keyfile)
        sock = bind_unix(network.uds) if network.uds else bind(network.host, network.port)
        gc.disable()  # to look for garbage takes a sixth of what follows, and there is none
        from nybble.engine import EngineFailedError
        from nybble.server.lifecycle.launch import launch

        gc.enable()

        code = 0
        try:
            launch(options, sock)
        except EngineFailedError as error:
            report(str(error))
            code = _ENGINE_FAILED
        finally:
            if network.uds:
                network.uds.unlink(missing_ok=True)
    end_at_once(code)
