"""What runs the VMs of a host: ``base`` is the interface, ``qemu`` the implementation that needs no libvirt.

Imports of ours: ``domain``, ``errors``, ``secret``. Nothing here knows of channels, orders or journals.
"""
