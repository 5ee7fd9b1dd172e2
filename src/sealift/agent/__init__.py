"""One agent per host: takes orders, drives QEMU and the relays, never decides what it cannot know."""
