"""The demonstration: a controller, two agents and a real Linux guest on one machine."""
