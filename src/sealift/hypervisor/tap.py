"""A tap on a bridge, opened by us and inherited by QEMU, whose sandbox lets it start no helper of its own.

The tap lives as long as a descriptor of it is open: it goes with its QEMU. Needs CAP_NET_ADMIN.
Sources: linux/if_tun.h, linux/sockios.h, netdevice(7).
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct

from sealift.domain.vm import Network
from sealift.errors import HypervisorError

_TUNSETIFF = 0x400454CA
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 0x1
_SIOCSIFHWADDR, _ARPHRD_ETHER = 0x8924, 1
_SIOCGIFINDEX, _SIOCBRADDIF = 0x8933, 0x89A2


def _request(name: str, value: bytes = b"") -> bytes:
    """A ``struct ifreq``: 16 bytes of name, 24 of value."""
    return name.encode().ljust(16, b"\0") + value.ljust(24, b"\0")


def open_tap(network: Network) -> int:
    """A descriptor of a new tap that is a port of ``network.bridge`` and up; the caller closes it.

    Raises HypervisorError: no such bridge, no right to.
    """
    tap = -1
    try:
        tap = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
        flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR
        answer = fcntl.ioctl(tap, _TUNSETIFF, _request("slft%d", struct.pack("H", flags)))
        name = answer[:16].rstrip(b"\0").decode()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as control:
            # A bridge takes the lowest address of its ports for its own. With fe in front the tap's never is.
            address = bytes.fromhex("fe" + network.mac.replace(":", "")[2:])
            fcntl.ioctl(control, _SIOCSIFHWADDR, _request(name, struct.pack("H", _ARPHRD_ETHER) + address))
            index = fcntl.ioctl(control, _SIOCGIFINDEX, _request(name))[16:20]
            fcntl.ioctl(control, _SIOCBRADDIF, _request(network.bridge, index))
            (now,) = struct.unpack_from("H", fcntl.ioctl(control, _SIOCGIFFLAGS, _request(name)), 16)
            fcntl.ioctl(control, _SIOCSIFFLAGS, _request(name, struct.pack("H", now | _IFF_UP)))
    except OSError as error:
        if tap >= 0:
            os.close(tap)
        raise HypervisorError(
            f"no tap can be put on bridge {network.bridge}: {error.strerror}",
            todo="the bridge must exist, and the agent needs CAP_NET_ADMIN and /dev/net/tun",
        ) from error
    return tap
