"""The HTTP surface below any route: sockets, TLS, CORS, error bodies, forms."""
