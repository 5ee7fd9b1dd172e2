"""One agent per host: takes the controllers' orders, drives QEMU and the relays, and never decides what it cannot know."""
