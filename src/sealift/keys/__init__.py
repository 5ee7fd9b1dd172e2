"""Key providers, and what their keys protect: disks' keys, and the configuration files of encrypted VMs."""
