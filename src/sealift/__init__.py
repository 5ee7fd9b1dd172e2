"""Sealift moves running virtual machines between QEMU/KVM hosts, every byte sealed under a one-time key."""

__version__ = "0.1.0"
