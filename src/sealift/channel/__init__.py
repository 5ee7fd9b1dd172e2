"""The sealed channel: one TCP connection that carries one byte stream each way under a one-time key.

The pure half (``protocol``, ``noise``, ``records``, ``session``) takes bytes in and gives bytes and events out; it has
no clock, no socket and no randomness but what it is handed. docs/protocol/channel.md is normative for it.
"""
