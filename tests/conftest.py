"""Fixtures that every test can ask for by name."""

pytest_plugins = ("support.guest", "support.command_line")
