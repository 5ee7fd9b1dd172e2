"""The public API: wire models, routes and the application."""
